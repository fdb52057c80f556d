"""The server of Byz-SGD, whole or as one of several column shards.

Shapes: n' messages that arrived, d_s columns of this shard (d if there is one).

Notable choices
- One round is survey -> plan -> step. A survey is small (n' x n' numbers), the plan smaller; only they pass between shards,
  so the same three methods serve a single server and one cut by coordinates, with the same bits.
- Rows are shuffled every round: with ties, a rule that prefers low indices would otherwise learn who is honest (spec 8).
- A round in which too few messages arrive for the rule's bound leaves the model as it is, and is counted.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from raysys.aggregation import Plan, Rule, Survey, survey
from raysys.runtime.seeds import Seeds, Stream
from raysys.systems.byzantine.setting import Setting

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
State = dict[str, NDArray]


class Aggregator:
    """Model, momentum and memory of the server for the columns [start, stop) of d."""

    def __init__(
        self, start_model: F32, setting: Setting, rule: Rule, seeds: Seeds, columns: slice | None = None
    ) -> None:
        columns = columns or slice(0, len(start_model))
        self.setting, self.rule, self.seeds = setting, rule, seeds
        self.model: F32 = start_model[columns].copy()
        self.reference = np.zeros_like(self.model)  # the last aggregate: centered clipping starts from it
        self.velocity = np.zeros_like(self.model)
        n = setting.workers if setting.remember else 0
        self.memory = np.zeros((n, len(self.model)), dtype=np.float32)
        self.known = np.zeros(n, dtype=bool)
        self.skipped = self.rejected = 0
        self._stack: torch.Tensor | None = None

    def aggregate(self, round: int, ids: I64, rows: F32) -> F32:
        """One whole round of an unsharded server: messages (n', d) of workers `ids` in, new model (d,) out."""
        return self.step(round, self.plan(round, [self.survey(round, ids, rows)]))

    def survey(self, round: int, ids: I64, rows: F32) -> Survey:
        """Shuffle and keep this shard's columns (n', d_s) of the messages; returns what the plan is made from."""
        if self.setting.remember:
            self.memory[ids], self.known[ids] = rows, True
            ids = np.flatnonzero(self.known)
            rows = self.memory[ids]
        order = np.argsort(ids, kind="stable")  # arrival order must not matter
        order = order[self.seeds.rng(Stream.SHUFFLE, 0, round).permutation(len(ids))]
        self._stack = torch.from_numpy(rows[order])
        return survey(self._stack, torch.from_numpy(self.reference), products=self.rule.least)

    def plan(self, round: int, surveys: list[Survey]) -> Plan | None:
        """What to do with the columns, from the surveys of all shards in column order; None if too few messages arrived."""
        joined = Survey.join(surveys)
        alive = int(np.count_nonzero(joined.finite))
        lost = len(joined.finite) - alive
        try:
            self.rule.requires(alive, max(self.rule.f - lost, 0))
        except ValueError:
            return None
        if not self.rule.plannable:  # it sees whole rows, so there is nothing to plan: `step` calls it
            return Plan(alive + lost, ())
        return self.rule.plan(joined, rng=self.seeds.rng(Stream.SHUFFLE, 1, round))

    def step(self, round: int, plan: Plan | None) -> F32:
        """Apply the plan to this shard's columns and move its part of the model (d_s,)."""
        assert self._stack is not None, "step follows survey"
        stack, self._stack = self._stack, None
        if plan is None:
            self.skipped += 1
            return self.model
        if not self.rule.plannable:
            rng = self.seeds.rng(Stream.SHUFFLE, 1, round)
            vector, _, rejected = self.rule.aggregate(stack, reference=torch.from_numpy(self.reference), rng=rng)
        else:
            vector, rejected = plan.apply(stack, torch.from_numpy(self.reference)), plan.rejected
        self.rejected += len(rejected)
        aggregate: F32 = vector.numpy()
        self.reference = aggregate
        if self.setting.momentum_at == "server":
            beta = np.float32(self.setting.momentum)
            aggregate = beta * self.velocity + (np.float32(1) - beta) * aggregate
            self.velocity = aggregate
        if self.setting.normalised:
            norm = float(np.linalg.norm(aggregate.astype(np.float64)))
            aggregate = (aggregate / np.float32(max(norm, 1e-30))).astype(np.float32)
        self.model = self.model - np.float32(self.setting.step_size(round)) * aggregate
        return self.model

    def outcomes(self) -> dict[str, int]:
        """Rounds without an update because too few messages arrived, and rows rejected as non-finite."""
        return {"skipped": self.skipped, "rejected": self.rejected}

    def state_dict(self) -> State:
        return {
            "model": self.model,
            "reference": self.reference,
            "velocity": self.velocity,
            "memory": self.memory,
            "known": self.known,
            "counts": np.array([self.skipped, self.rejected]),
        }

    def load_state_dict(self, state: State) -> None:
        self.model, self.reference = state["model"].copy(), state["reference"].copy()
        self.velocity, self.memory = state["velocity"].copy(), state["memory"].copy()
        self.known = state["known"].astype(bool)
        self.skipped, self.rejected = (int(v) for v in state["counts"])
        self._stack = None
