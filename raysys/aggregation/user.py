"""A rule written by the user: any function (n, d) tensor -> (d,) tensor, named "module:function" or "file.py:function"."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raysys.aggregation.gram import F64, Survey, survey
from raysys.aggregation.rule import Aggregation, Plan, Rule, Stack, as_stack


def load(spec: str) -> Callable[..., Any]:
    """The function behind "module:function" or "path/to/file.py:function". Raises ValueError if there is none."""
    place, _, name = spec.rpartition(":")
    if not place or not name.isidentifier():
        raise ValueError(f"'{spec}' is not of the form module:function")
    try:
        if place.endswith(".py"):
            path = Path(place)
            if not path.is_file():
                raise ValueError(f"'{spec}': there is no file {place}")
            found = importlib.util.spec_from_file_location(path.stem, path)
            assert found is not None
            assert found.loader is not None
            module = importlib.util.module_from_spec(found)
            sys.modules.setdefault(path.stem, module)
            found.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
    except ImportError as error:
        raise ValueError(f"'{spec}': cannot import {place}: {error}") from None
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"'{spec}': {place} has no function {name}")
    return function


class UserRule(Rule):
    """Wraps the user's function; it gets the finite rows, and f if it has a parameter of that name.

    It sees whole vectors, so it cannot be planned on a survey nor cut over coordinates.
    """

    name = "user"

    def __init__(self, n: int, f: int, spec: str) -> None:
        super().__init__(n, f)
        self.spec = spec
        self.function = load(spec)
        self.name = spec  # type: ignore[misc]
        try:
            self._takes_f = "f" in inspect.signature(self.function).parameters
        except ValueError:  # a builtin without a signature
            self._takes_f = False

    def __reduce__(self) -> Any:
        return UserRule, (self.n, self.f, self.spec)

    def requires(self, n: int, f: int) -> None:
        """What the function needs is its own to say."""

    def breakdown(self, n: int) -> int:
        """Unknown: measure it with the audit. The largest minority is returned."""
        return (n - 1) // 2

    def plan(self, survey: Survey, *, weights: F64 | None = None, rng: np.random.Generator | None = None) -> Plan:
        raise ValueError(f"{self.spec} is a user's own rule: it sees whole vectors and cannot be cut over coordinates")

    def call(self, rows: torch.Tensor, f: int) -> torch.Tensor:
        """The function's output for rows (n, d), checked: (d,)."""
        out = self.function(rows, f=f) if self._takes_f else self.function(rows)
        if not isinstance(out, torch.Tensor) or out.shape != rows.shape[1:]:
            got = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
            raise ValueError(f"{self.spec} returned {got}, a rule returns a tensor of shape {tuple(rows.shape[1:])}")
        return out.to(rows.dtype)

    def aggregate(
        self, stack: Stack, *, weights: F64 | None = None, reference: Any = None, rng: np.random.Generator | None = None
    ) -> Aggregation:
        tensor, back = as_stack(stack)
        if weights is not None:
            self._shares(weights, len(tensor))
        finite = survey(tensor, products=False).finite
        if not finite.any():
            raise ValueError(f"{self.spec} got no finite row out of {len(finite)}")
        rejected = tuple(int(i) for i in np.flatnonzero(~finite))
        rows = tensor[torch.from_numpy(finite).to(tensor.device)] if rejected else tensor.clone()
        return Aggregation(back(self.call(rows, max(0, self.f - len(rejected)))), None, rejected)
