"""Chains of pre-aggregators and a rule, rules per layer, and rules written by the user."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from raysys.aggregation.gram import F64
from raysys.aggregation.preaggregate import PreAggregator
from raysys.aggregation.rule import Decision, Kappa, Rule, View


class Pipeline(Rule):
    """Pre-aggregators in order, then a rule; all coefficients are composed in n x n space, the data is passed over twice."""

    def __init__(self, before: Sequence[PreAggregator], rule: Rule) -> None:
        self.before, self.rule = tuple(before), rule
        self.name = "+".join([p.name for p in before] + [rule.name])  # type: ignore[misc]
        self.weighted = rule.weighted and all(p.weighted for p in before)  # type: ignore[misc]
        super().__init__(before[0].n, before[0].f)

    def requires(self, n: int, f: int) -> None:
        if not 2 * f < n and not self.rule.name == "mean":
            raise ValueError(f"{self.name} needs n > 2f, got n={n}, f={f}")
        for p in self.before:
            n = p.count(n, f)
        self.rule.requires(n, f)

    def kappa(self, n: int, f: int) -> Kappa | None:
        sizes = [n]
        for p in self.before:
            sizes.append(p.count(sizes[-1], f))
        value = self.rule.kappa(sizes[-1], f)
        for p, size in zip(reversed(self.before), reversed(sizes[:-1]), strict=True):
            value = p.kappa(size, f, value)
        return value

    def compose(self, view: View) -> tuple[Decision, F64 | None]:
        total: F64 | None = None
        for p in self.before:
            step = p.matrix(view)
            mixed = view.survey.mix(step)
            view = view._replace(survey=mixed, n=len(step))
            full = np.vstack([step, np.eye(step.shape[1])[step.shape[1] - 1 - mixed.has_reference :]])
            total = full if total is None else full @ total
        decision, inner = self.rule.compose(view)
        if inner is not None:
            raise ValueError(f"a chain has one rule, at its end; {self.name} has a chain inside")
        return decision, total
