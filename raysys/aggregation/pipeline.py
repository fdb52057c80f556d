"""Chains of pre-aggregators and a rule, rules per layer, and rules written by the user."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from raysys.aggregation import columns
from raysys.aggregation.gram import F64, survey
from raysys.aggregation.preaggregate import PreAggregator
from raysys.aggregation.rule import Aggregation, Decision, Kappa, Rule, Stack, View, as_stack, as_vector, medoid
from raysys.aggregation.user import UserRule


class Pipeline(Rule):
    """Pre-aggregators in order, then a rule; all coefficients are composed in n x n space, the data is passed over twice."""

    def __init__(self, before: Sequence[PreAggregator], rule: Rule) -> None:
        self.before, self.rule = tuple(before), rule
        self.name = "+".join([p.name for p in before] + [rule.name])  # type: ignore[misc]
        self.trusts_first = rule.trusts_first  # type: ignore[misc]
        self.weighted = rule.weighted and all(p.weighted for p in before)  # type: ignore[misc]
        if all(p.sees == "norms" for p in before) and rule.least is not True:
            self.sees = "norms"
        super().__init__(before[0].n, before[0].f)

    @property
    def plannable(self) -> bool:
        return self.rule.plannable

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

    def mixing(self, view: View) -> tuple[View, F64]:
        """What the rule sees, and the matrix (n' + anchors, m) that makes it out of [rows; anchors]."""
        total: F64 | None = None
        for p in self.before:
            step = p.matrix(view)
            mixed = view.survey.mix(step)
            rows = view.rows if len(step) == view.n else np.arange(len(step))
            view = view._replace(survey=mixed, n=len(step), rows=rows, mixed=True)
            full = np.vstack([step, np.eye(step.shape[1])[step.shape[1] - 1 - mixed.has_reference :]])
            total = full if total is None else full @ total
        assert total is not None
        return view, total

    def compose(self, view: View) -> tuple[Decision, F64 | None]:
        if not self.plannable:
            raise ValueError(f"{self.name} ends in a user's own rule: it sees whole rows, call aggregate")
        seen, total = self.mixing(view)
        return self.rule.compose(seen)[0], total

    def aggregate(
        self, stack: Stack, *, weights: F64 | None = None, reference: Any = None, rng: np.random.Generator | None = None
    ) -> Aggregation:
        """The output; a chain that ends in a user's rule mixes whole rows and hands them over, n x n logic before."""
        if not isinstance(self.rule, UserRule):
            return super().aggregate(stack, weights=weights, reference=reference, rng=rng)
        tensor, back = as_stack(stack)
        if weights is not None:
            self._shares(weights, len(tensor))
        seen = survey(tensor)
        kept = np.flatnonzero(seen.finite)
        rejected = tuple(int(i) for i in np.flatnonzero(~seen.finite))
        f = max(0, self.f - len(rejected))
        self.requires(len(kept), f)
        view = View(seen.restrict(kept), len(kept), f, None, rng, kept)
        after, total = self.mixing(view)
        wide = np.zeros((after.n, len(tensor) + 2))
        wide[:, kept] = total[: after.n, : len(kept)]
        rows = columns.mix(tensor, wide, int(kept[medoid(view)]))
        return Aggregation(back(self.rule.call(rows, f)), None, rejected)


class PerLayer:
    """One plan per slice of the vector, for models whose layers differ in scale (epfml/disco PR 1052)."""

    def __init__(self, rule: Rule, sizes: Sequence[int]) -> None:
        if not sizes or min(sizes) < 1:
            raise ValueError(f"per-layer sizes are positive, got {list(sizes)}")
        self.rule, self.sizes = rule, tuple(int(s) for s in sizes)

    def aggregate(
        self, stack: Stack, *, weights: F64 | None = None, reference: Any = None, rng: np.random.Generator | None = None
    ) -> list[Aggregation]:
        """One aggregation per slice, in order. A row is rejected in the slices where it is not finite."""
        tensor, back = as_stack(stack)
        if sum(self.sizes) != tensor.shape[1]:
            raise ValueError(f"layer sizes add up to {sum(self.sizes)}, the stack has d={tensor.shape[1]}")
        ref = None if reference is None else as_vector(reference, tensor)
        out, start = [], 0
        for size in self.sizes:
            piece = slice(start, start + size)
            part = None if ref is None else ref[piece]
            done = self.rule.aggregate(tensor[:, piece], weights=weights, reference=part, rng=rng)
            out.append(done._replace(vector=back(done.vector)))
            start += size
        return out

    def __call__(
        self, stack: Stack, *, weights: F64 | None = None, reference: Any = None, rng: np.random.Generator | None = None
    ) -> Any:
        """The slices' aggregates in one vector (d,); same kind and type as the stack."""
        parts = [a.vector for a in self.aggregate(stack, weights=weights, reference=reference, rng=rng)]
        return torch.cat(parts) if isinstance(parts[0], torch.Tensor) else np.concatenate(parts)
