"""Small runs of the system in this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from raysys.systems.tad_lora.setting import Setting
from raysys.systems.tad_lora.simulate import Simulation
from raysys.systems.tad_lora.task import Task

REGRESSION = {
    "problem": "regression", "optimizer": "sgd", "lr": 0.01, "steps": 5, "rounds": 12, "topology": "erdos_renyi(p=0.3)",
    "evaluate_every": 100,
}  # fmt: skip
TEXT = {
    "data": "grammar(train=240, test=60)",
    "test": 20,
    "steps": 2,
    "rounds": 3,
    "batch": 3,
    "topology": "ring",
    "evaluate_every": 100,
}


@pytest.fixture
def simulate() -> Callable[..., Simulation]:
    """simulate(rounds done, seed, **setting) -> the simulation after its rounds; the regression problem unless told otherwise."""

    def run(seed: int = 3, block: int = 5, **values: Any) -> Simulation:
        base = TEXT if values.get("problem") == "text" else REGRESSION
        simulated = Simulation(Task(Setting.of(base | values), seed), block)
        for t in range(simulated.task.rounds):
            simulated.step(t)
        return simulated

    return run


def factors(simulated: Simulation) -> tuple[np.ndarray, np.ndarray]:
    """A (n, size_a) and B (n, size_b) of all peers."""
    return np.concatenate([p.a for p in simulated.blocks]), np.concatenate([p.b for p in simulated.blocks])
