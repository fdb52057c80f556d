"""The environments by name, for gymnasium and for configurations."""

from __future__ import annotations

from typing import Any

import gymnasium

from raysys.systems.ernie.environments.arithmetic import Arithmetic
from raysys.systems.ernie.environments.count import CountDigits
from raysys.systems.ernie.environments.nextframe import NextFrame
from raysys.systems.ernie.environments.question import SingleTurn
from raysys.systems.ernie.environments.tones import Tones

ENVIRONMENTS: dict[str, type[SingleTurn]] = {
    "arithmetic": Arithmetic, "count": CountDigits, "tones": Tones, "nextframe": NextFrame,
}  # fmt: skip
IDS = {
    "arithmetic": "Arithmetic-v0",
    "count": "CountDigits-v0",
    "tones": "Tones-v0",
    "nextframe": "NextFrame-v0",
}


def register() -> None:
    """Make the environments known to gymnasium.make by their ids; again does nothing."""
    for name, id in IDS.items():
        if id not in gymnasium.registry:
            kind = ENVIRONMENTS[name]
            gymnasium.register(id, entry_point=f"{kind.__module__}:{kind.__name__}")


def make(name: str, **options: Any) -> SingleTurn:
    """An environment by its name here, with its difficulty options.

    Raises:
        ValueError: there is none of that name, or an option is wrong.
    """
    if name not in ENVIRONMENTS:
        raise ValueError(f"environment: got {name!r}; expected one of {', '.join(ENVIRONMENTS)}")
    return ENVIRONMENTS[name](**options)
