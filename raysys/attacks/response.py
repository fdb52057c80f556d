"""Attacks that try the receiver's own rule before they choose: line searches and the best response of a family.

Attacks exist only in simulation.

Notable choices
- Every candidate is mu + t p, a combination of the honest rows and a few extra rows (s, ...). One survey of those rows
  gives all inner products; a rule that combines linearly is then tried in n x n numbers, without touching d
  (specs/byzantine.md section 2.8). Coordinate-wise rules are tried with their own kernels on at most COLUMNS evenly
  spaced columns, exact when d is smaller. A rule that sees whole rows (a user's own) is called on whole stacks.
- The trial stack is in a random order, as the server's is: an attacker gains nothing from ties it could not foresee.
- A rule that draws random numbers is tried with the attacker's own; it does not know the server's.

Shapes: h honest rows, k extra rows, d coordinates; coefficients (h + k,) over [honest; extra].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raysys.aggregation import Plan, Rule, Survey, survey
from raysys.attacks.distance import inner_products, min_max_gamma, mirror_groups
from raysys.attacks.simple import MaxBias, alie_z_max
from raysys.attacks.threat import Attack, PeerView, Threat

F64 = NDArray[np.float64]
COLUMNS = 1024
Badness = tuple[float, float]
GOLDEN = (5.0**0.5 - 1.0) / 2.0


class Response:
    """What the rule does with what the Byzantine nodes send.

    extra: (k, d) rows beside the honest ones; probe: (h + k,) the combination whose inner product with F - mu is
    reported (mu when None). columns: how many columns coordinate-wise rules are tried on, None for all.
    ValueError when the threat names no rule.
    """

    def __init__(
        self,
        honest: Tensor,
        extra: Tensor,
        threat: Threat,
        name: str,
        probe: F64 | None = None,
        columns: int | None = COLUMNS,
    ) -> None:
        if threat.rule is None:
            raise ValueError(f"{name} tries the rule of the receiver and needs threat.rule, got None")
        self.h, self.f, self.rule = len(honest), threat.f, threat.rule
        self.n = self.h + self.f
        self.base = torch.cat([honest, extra.to(honest)])
        self.mean = np.zeros(len(self.base))
        self.mean[: self.h] = 1.0 / self.h
        self.probe = self.mean if probe is None else probe
        self.reference = None if threat.reference is None else threat.reference.to(honest)
        self._seed = int(threat.rng.integers(2**63))
        self._order = threat.rng.permutation(self.n)
        self._survey: Survey | None = None
        self._fixed: Plan | None = None
        stride = 1
        if isinstance(self.rule, Rule) and self.rule.plannable:
            self._survey = survey(self.base, self.reference, products=self.rule.needs_products)
            if not self.rule.needs_products:
                self._fixed = self._plan(self._survey.mix(self._matrix(self.mean)))
                if self._fixed.weights is not None:  # the mean: needs no products to decide, but here to measure
                    self._survey, self._fixed = survey(self.base, self.reference), None
            stride = 1 if columns is None else max(1, -(-honest.shape[1] // columns))
            if self._survey.grams is not None:
                self._prepare_products()
        elif not isinstance(self.rule, Rule):  # a peer's rule: its own model comes first
            self._order = np.arange(self.n)
        self._columns = self.base[:, ::stride].contiguous()
        self._near = None if self.reference is None else self.reference[::stride].contiguous()
        self._scale = self.base.shape[1] / self._columns.shape[1]
        both = torch.as_tensor(np.stack([self.mean, self.probe])).to(self._columns) @ self._columns
        self._mean, self._probe = both[0], both[1]
        self._honest_at = torch.from_numpy(np.argsort(self._order)[: self.h])
        self._byzantine_at = torch.from_numpy(np.argsort(self._order)[self.h :])

    def combine(self, coefficients: F64) -> Tensor:
        """The candidate itself: (d,), or (f, d) for coefficients (f, h + k)."""
        return torch.as_tensor(coefficients).to(self.base) @ self.base

    def many(self, candidates: Sequence[F64]) -> list[tuple[float, float]]:
        """`self(c)` for each candidate; coordinate-wise rules take them side by side in one pass."""
        if self._fixed is None:
            return [self(c) for c in candidates]
        wide = self._columns.shape[1]
        stack = self._columns.new_empty((self.n, len(candidates), wide))
        stack[self._honest_at] = self._columns[: self.h, None]
        rows = np.stack([np.broadcast_to(c, (self.f, len(self.base))) for c in candidates], axis=1)
        stack[self._byzantine_at] = torch.from_numpy(rows).to(stack) @ self._columns
        outputs = self._fixed.apply(stack.reshape(self.n, -1)).reshape(-1, wide) - self._mean
        squares, along = (outputs * outputs).sum(1).tolist(), (outputs @ self._probe).tolist()
        return [(_number(self._scale * s), _number(self._scale * a)) for s, a in zip(squares, along, strict=True)]

    def __call__(self, coefficients: F64) -> tuple[float, float]:
        """||F - mu||^2 (on the tried columns, scaled to d) and <F - mu, probe>; -inf for NaN.

        coefficients: (h + k,) what all send, or (f, h + k) what each sends.
        """
        if self._fixed is not None:
            return self.many([coefficients])[0]
        if self._survey is None:
            return self._measure(self._whole(self._stack(coefficients)))
        matrix = self._matrix(coefficients)
        plan = self._plan(self._survey.mix(matrix))
        if plan.weights is None:
            return self._measure(plan.apply(self._stack(coefficients), self._near))
        change = plan.weights @ matrix
        change[: len(self.mean)] -= self.mean
        if self.reference is not None:
            change[-1] += plan.bias
        change[len(self.mean)] -= change.sum()  # the origin is zero: what is left of the sum lies there
        projected = self._gram @ change
        return _number(max(float(change @ projected), 0.0)), _number(float(self._anchored @ projected))

    def _prepare_products(self) -> None:
        assert self._survey is not None
        self._gram = self._survey.gram
        self._anchored = np.zeros(len(self._gram))
        self._anchored[: len(self.probe)] = self.probe
        self._anchored[len(self.probe)] -= self.probe.sum()

    def _matrix(self, coefficients: F64) -> F64:
        matrix = np.zeros((self.n, len(self.base) + 1 + (self.reference is not None)))
        matrix[: self.h, : self.h] = np.eye(self.h)
        matrix[self.h :, : len(self.base)] = coefficients
        return matrix[self._order]

    def _plan(self, mixed: Survey) -> Plan:
        return self.rule.plan(mixed, rng=np.random.default_rng(self._seed))

    def _whole(self, stack: Tensor) -> Tensor:
        """The output of a rule that sees whole rows."""
        if isinstance(self.rule, Rule):
            rng = np.random.default_rng(self._seed)
            output: Tensor = self.rule.aggregate(stack, reference=self.reference, rng=rng).vector
            return output
        return self.rule(stack)

    def _stack(self, coefficients: F64) -> Tensor:
        stack = self._columns.new_empty((self.n, self._columns.shape[1]))
        stack[self._honest_at] = self._columns[: self.h]
        stack[self._byzantine_at] = torch.as_tensor(coefficients).to(self._columns) @ self._columns
        return stack

    def _measure(self, output: Tensor) -> tuple[float, float]:
        change = output - self._mean
        return _number(self._scale * float(change @ change)), _number(self._scale * float(change @ self._probe))


def _number(value: float) -> float:
    return -np.inf if np.isnan(value) else value


def line_search(
    score: Callable[[float], Any], grid: Sequence[float], steps: int, values: Sequence[Any] | None = None
) -> float:
    """The best factor of an ascending positive grid, then of `steps` golden sections of the log between its neighbours.

    values: the scores of the grid where they are known already.
    """
    values = [score(t) for t in grid] if values is None else values
    k = max(range(len(grid)), key=lambda i: values[i])
    best, top = grid[k], values[k]
    if not steps:
        return best
    low, high = np.log(grid[max(k - 1, 0)]), np.log(grid[min(k + 1, len(grid) - 1)])
    left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    at: dict[float, Any] = {}
    for _ in range(steps):
        for t in (left, right):
            if t not in at:
                at[t] = score(float(np.exp(t)))
                if at[t] > top:
                    best, top = float(np.exp(t)), at[t]
        if at[left] >= at[right]:
            high, right = right, left
            left = high - GOLDEN * (high - low)
        else:
            low, left = left, right
            right = low + GOLDEN * (high - low)
    return best


class OptAlie(Attack):
    """mu - z s with the z that moves the rule farthest from mu: a grid of factors of two, then golden sections."""

    name = "opt_alie"
    GRID: ClassVar = tuple(0.05 * 2.0**k for k in range(10))

    def __init__(self, refine: int = 6) -> None:
        self.refine = refine

    def rows(self, honest: Tensor, threat: Threat) -> Tensor:
        response = Response(honest, honest.std(0, correction=0)[None], threat, self.name)
        deviation = np.zeros(len(response.mean))
        deviation[-1] = -1.0
        return response.combine(response.mean + _farthest(response, response.mean, deviation, self) * deviation)


class OptIpm(Attack):
    """-epsilon mu with the epsilon that moves the rule farthest from mu."""

    name = "opt_ipm"
    GRID: ClassVar = tuple(0.05 * 2.0**k for k in range(12))

    def __init__(self, refine: int = 6) -> None:
        self.refine = refine

    def rows(self, honest: Tensor, threat: Threat) -> Tensor:
        response = Response(honest, honest[:0], threat, self.name)
        zero = np.zeros(len(response.mean))
        return response.combine(-_farthest(response, zero, -response.mean, self) * response.mean)


def _farthest(response: Response, origin: F64, direction: F64, attack: OptAlie | OptIpm) -> float:
    """The t > 0 for which origin + t direction moves the rule farthest from mu."""
    values = [squared for squared, _ in response.many([origin + t * direction for t in attack.GRID])]
    return line_search(lambda t: response(origin + t * direction)[0], attack.GRID, attack.refine, values)


class BestResponse(Attack):
    """The worst of a family, tried on the receiver's own rule every round.

    Family mu + t p:
      ALIE       p = -s,            t in {z_max, 0.5, 1, 2, 4} and Min-Max's t
      IPM, FOE   p = -mu,           t = 1 + epsilon, epsilon in {0.1, 0.5, 1, 10, 100}, and Min-Max's t
      max-bias   p = outside - mu,  t = 1 (outside the honest range of every coordinate, against mu)
      mimic      p = x_i - mu,      t = 1, for the honest row farthest from mu, the one most against mu, and the end of
                                    the main direction of the honest rows
      mirror     the mirror images of the f rows at that end, each Byzantine node one
    and then `refine` golden sections between the grid neighbours of the best t where that is ALIE or IPM.

    What "worst" means, F the rule's output:
      "descent"    smallest <F, mu>, the worst round for small steps; on real data the most damaging on most rules
      "deviation"  largest ||F - mu||^2, what (f, kappa)-robustness bounds. One step of 1/L with F loses at most
                   -<mu, F> + ||F||^2 / 2 = (||F - mu||^2 - ||mu||^2) / 2, so it is also the worst for the descent lemma
      "stall"      smallest ||F||, so that training stands still; the most damaging on Krum and the geometric median
    Each is greedy round by round; none is the worst on every rule over a whole run. Peers send models, whose mean is no
    gradient: there the criterion is always the deviation. Ties of "deviation" are decided against mu.
    """

    name = "best_response"
    ALIE: ClassVar = (0.5, 1.0, 2.0, 4.0)
    IPM: ClassVar = (0.1, 0.5, 1.0, 10.0, 100.0)

    def __init__(self, criterion: str = "descent", refine: int = 3) -> None:
        if criterion not in ("descent", "deviation", "stall"):
            raise ValueError(f"best_response needs a criterion among descent, deviation, stall, got {criterion!r}")
        self.criterion, self.refine = criterion, refine

    def rows(self, honest: Tensor, threat: Threat) -> Tensor:
        mean, spread = honest.mean(0), honest.std(0, correction=0)
        outside = MaxBias().rows(honest, threat)
        response = Response(honest, torch.stack([spread, outside]), threat, self.name)
        lines, others = self._family(honest, mean, spread, threat)
        family = [response.mean + t * p for grid, p in lines for t in grid] + others
        criterion = "deviation" if isinstance(threat.rule, PeerView) else self.criterion
        scores = [_badness(criterion, measured) for measured in response.many(family)]
        best = max(range(len(family)), key=lambda k: scores[k])
        start = 0
        for grid, p in lines:
            if self.refine and start <= best < start + len(grid):
                values = scores[start : start + len(grid)]

                def score(t: float, p: F64 = p) -> Badness:
                    return _badness(criterion, response(response.mean + t * p))

                return response.combine(response.mean + line_search(score, grid, self.refine, values) * p)
            start += len(grid)
        return response.combine(family[best])

    def _family(
        self, honest: Tensor, mean: Tensor, spread: Tensor, threat: Threat
    ) -> tuple[list[tuple[list[float], F64]], list[F64]]:
        h = len(honest)
        average = np.concatenate([np.full(h, 1.0 / h), np.zeros(2)])
        unit = np.eye(h + 2)
        gram, along_spread, a = inner_products(honest, -spread)
        products = (honest @ mean).double().cpu().numpy()
        size = float(products.mean())
        alie = [*self.ALIE, min_max_gamma(gram, along_spread, a)]
        if threat.n > 2 * threat.f:
            alie.append(alie_z_max(threat.n, threat.f))
        ipm = [1.0 + epsilon for epsilon in self.IPM] + [min_max_gamma(gram, size - products, size)]
        grids = [sorted({t for t in grid if t > 0 and np.isfinite(t)}) for grid in (alie, ipm)]
        chosen, rest = mirror_groups(gram, threat.f)
        copied = {int(gram.diagonal().argmax()), int(products.argmin())} | set(chosen[:1].tolist())
        others = [unit[i] for i in sorted(copied)] + [unit[h + 1]]
        if len(chosen):
            images = 2.0 * unit[rest].mean(0) - unit[chosen]
            others.append(images[np.arange(threat.f) % len(chosen)])
        return [(grids[0], -unit[h]), (grids[1], -average)], others


def _badness(criterion: str, measured: tuple[float, float]) -> Badness:
    """The larger, the worse; measured is (||F - mu||^2, <F - mu, mu>), and ||F||^2 = the first + twice the second + ||mu||^2."""
    deviation, along = measured
    if not (np.isfinite(deviation) and np.isfinite(along)):
        return deviation, 0.0
    if criterion == "descent":
        return -along, deviation
    if criterion == "stall":
        return -(deviation + 2.0 * along), deviation
    return float(f"{deviation:.9g}"), -along
