"""Mimic: repeat one honest worker, so that its data counts f + 1 times.

Attacks exist only in simulation. Source: Karimireddy+ 2022 (2006.09365), appendix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from raysys.attacks.threat import Attack, Threat, receivers


class Mimic(Attack):
    """Copy the honest row that sticks out most along the main direction of heterogeneity.

    For `warmup` rounds a running estimate z of the top direction of the honest deviations is refined by one power step
    a round, z <- t/(t+1) z + 1/(t+1) normalised sum_i <x_i - mu, z> (x_i - mu), and the row with the largest <x_i, z>
    is copied; afterwards the last target is copied for ever. warmup=0 copies row 0. Rows are told apart by their
    position, so the caller keeps the honest nodes in one order (the server's shuffle comes later).
    """

    name = "mimic"

    def __init__(self, warmup: int = 100) -> None:
        if warmup < 0:
            raise ValueError(f"mimic needs warmup >= 0 rounds, got {warmup}")
        self.warmup = warmup
        self.reset()

    def reset(self) -> None:
        self._z: Tensor | None = None
        self._rounds = 0
        self._target = 0

    def rows(self, honest: Tensor, threat: Threat) -> Tensor:
        if self._rounds < self.warmup:
            deviations = honest - honest.mean(0)
            if self._z is None or self._z.shape != honest.shape[1:]:
                self._z = torch.from_numpy(threat.rng.standard_normal(honest.shape[1])).to(honest)
            z = self._z.to(honest)
            step = deviations.T @ (deviations @ z)
            size = torch.linalg.vector_norm(step)
            if size > 0:
                share = 1.0 / (self._rounds + 1)
                self._z = (1.0 - share) * z + share * step / size
            self._target = int((honest @ self._z.to(honest)).argmax())
            self._rounds += 1
        return honest[min(self._target, len(honest) - 1)]

    def craft_edges(
        self, models: Tensor, mixing: np.ndarray, byzantine: Sequence[int], threat: Threat
    ) -> dict[tuple[int, int], Tensor]:
        """One target for the whole network, found among all honest models."""
        bad = set(byzantine)
        honest = models[[i for i in range(len(models)) if i not in bad]]
        row = self.craft(honest, replace(threat, f=1))[0]
        return {(int(b), i): row.clone() for i, senders, _ in receivers(mixing, byzantine) for b in senders}

    def state_dict(self) -> dict[str, Tensor]:
        state = {"counters": torch.tensor([self._rounds, self._target])}
        return state if self._z is None else {**state, "direction": self._z}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if "counters" not in state or set(state) - {"counters", "direction"}:
            raise ValueError(f"mimic's state is counters and direction, got {sorted(state)}")
        self._rounds, self._target = (int(v) for v in state["counters"])
        self._z = state.get("direction")
