"""What a sweep varies: fields with the values or ranges they may take, written on one line each. Knows nothing of Ray."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from raysys.runtime.sentences import UserError


@dataclass(frozen=True)
class Choice:
    """One of the given values; a grid search tries each."""

    values: tuple[Any, ...]


@dataclass(frozen=True)
class Range:
    """A number between low and high, uniform or log-uniform; whole if `integer` (high included)."""

    low: float
    high: float
    log: bool = False
    integer: bool = False


Space = Mapping[str, Choice | Range]


def parse_space(items: Sequence[str]) -> dict[str, Choice | Range]:
    """Read a space from words: "lr=0.01,0.1" (choices), "lr=1e-3..1" (range), "lr=1e-3..1:log", "n=5..50:int"."""
    space: dict[str, Choice | Range] = {}
    for item in items:
        name, equals, text = item.partition("=")
        if not (equals and name.strip() and text.strip()):
            raise UserError(f"space: got {item!r}; expected field=a,b,c or field=low..high, or field=low..high:log")
        found = re.fullmatch(r"([^.,]\S*?)\.\.([^:,]+)((?::(?:log|int))*)", text)
        if found is None:
            space[name] = Choice(tuple(_value(word.strip()) for word in text.split(",")))
            continue
        low, high = _value(found[1]), _value(found[2])
        log, integer = ":log" in found[3], ":int" in found[3]
        numeric = all(isinstance(x, int | float) and math.isfinite(x) for x in (low, high))
        if not numeric or low >= high or (log and low <= 0) or (integer and not float(low).is_integer()):
            raise UserError(f"space: got {item!r}; expected numbers low..high with low < high, and low > 0 with :log")
        space[name] = Range(low, high, log, integer)
    return space


def check_space(space: Space, search: str, samples: int, scheduler: str | None, steps: int) -> None:
    """UserError if a sweep of this kind cannot be made over this space."""
    if not space:
        raise UserError("space: got nothing; expected at least one field=values")
    if samples < 1:
        raise UserError(f"samples: got {samples}; expected a whole number of at least 1")
    for name, domain in space.items():
        if search == "grid" and isinstance(domain, Range):
            raise UserError(f"space: got a range for {name}; a grid search needs values, as in {name}=0.1,0.2")
    if scheduler == "asha" and steps < 2:
        raise UserError(f"scheduler: got asha with {steps} step; it needs trials that report at 2 steps or more")


def _value(word: str) -> Any:
    try:
        return float(word) if re.fullmatch(r"[-+]?\d*\.?\d+[eE][-+]?\d+", word) else yaml.safe_load(word)
    except yaml.YAMLError:
        return word
