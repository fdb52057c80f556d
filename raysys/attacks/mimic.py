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
    is copied; afterwards the node copied last is copied for ever. warmup=100 is the published number: in a run of fewer
    rounds the target may change to the end, so give a smaller one there. warmup=0 copies the first row of the first round.

    Nodes are known by `threat.ids`. In a round in which the target is absent, the present row with the largest
    <x_i, z> is copied (the first one if there is no z), and the target is kept.
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
        self._target: int | None = None

    def rows(self, honest: Tensor, threat: Threat) -> Tensor:
        ids = np.arange(len(honest)) if threat.ids is None else np.asarray(threat.ids)
        if self._rounds < self.warmup:
            self._refine(honest, threat.rng)
            self._target = int(ids[self._farthest(honest)])
        elif self._target is None:
            self._target = int(ids[0])
        place = np.flatnonzero(ids == self._target)
        return honest[int(place[0]) if len(place) else self._farthest(honest)]

    def _refine(self, honest: Tensor, rng: np.random.Generator) -> None:
        deviations = honest - honest.mean(0)
        if self._z is None or self._z.shape != honest.shape[1:]:
            self._z = torch.from_numpy(rng.standard_normal(honest.shape[1])).to(honest)
        z = self._z.to(honest)
        step = deviations.T @ (deviations @ z)
        size = torch.linalg.vector_norm(step)
        if size > 0:
            share = 1.0 / (self._rounds + 1)
            self._z = (1.0 - share) * z + share * step / size
        self._rounds += 1

    def _farthest(self, honest: Tensor) -> int:
        """The row with the largest <x_i, z>."""
        return 0 if self._z is None else int((honest @ self._z.to(honest)).argmax())

    def craft_edges(
        self, models: Tensor, mixing: np.ndarray, byzantine: Sequence[int], threat: Threat
    ) -> dict[tuple[int, int], Tensor]:
        """One target for the whole network, found among the honest models that are connected in this round."""
        edge = np.asarray(mixing) > 0
        np.fill_diagonal(edge, False)
        ids = np.setdiff1d(np.flatnonzero(edge.any(0) | edge.any(1)), list(byzantine))
        if not len(ids):
            return {}
        row = self.craft(models[torch.from_numpy(ids)], replace(threat, f=1, ids=ids))[0]
        return {(int(b), i): row.clone() for i, senders, _ in receivers(mixing, byzantine) for b in senders}

    def state_dict(self) -> dict[str, Tensor]:
        state = {"counters": torch.tensor([self._rounds, -1 if self._target is None else self._target])}
        return state if self._z is None else {**state, "direction": self._z}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if "counters" not in state or set(state) - {"counters", "direction"}:
            raise ValueError(f"mimic's state is counters and direction, got {sorted(state)}")
        self._rounds, target = (int(v) for v in state["counters"])
        self._target = None if target < 0 else target
        self._z = state.get("direction")
