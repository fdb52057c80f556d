"""Rules whose output is a linear combination of the inputs: decided on inner products alone (spec 2.5, 2.8).

Shapes: gram (m, m), rows first, then the origin, then the reference if there is one; coefficients (m,).
"""

from __future__ import annotations

import numpy as np

from raysys.aggregation import solvers
from raysys.aggregation.gram import F64
from raysys.aggregation.robustness import price
from raysys.aggregation.rule import Combination, Decision, Kappa, Rule, View, squared_distances


def over_rows(view: View, weights: F64) -> Combination:
    """A combination of the rows alone."""
    out = np.zeros(view.n + 1 + view.survey.has_reference)
    out[: view.n] = weights
    return Combination(out)


def average(view: View, kept: F64 | np.ndarray) -> Combination:
    """The plain mean of the rows in `kept`."""
    weights = np.zeros(view.n)
    weights[kept] = 1.0 / len(kept)
    return over_rows(view, weights)


class Mean(Rule):
    """The (weighted) mean. Not robust: one row moves it anywhere."""

    name = "mean"
    needs_products = False
    weighted = True

    def requires(self, n: int, f: int) -> None:
        """Any f is accepted, because the mean is the baseline that breaks; `breakdown` and `kappa` say so."""
        if n < 1:
            raise ValueError(f"the mean needs n >= 1, got n={n}")

    def breakdown(self, n: int) -> int:
        return 0

    def kappa(self, n: int, f: int) -> Kappa:
        return Kappa(0.0 if f == 0 else float("inf"), "exact", "by definition")

    def decide(self, view: View) -> Decision:
        return over_rows(view, np.full(view.n, 1.0 / view.n) if view.weights is None else view.weights)


class GeometricMedian(Rule):
    """argmin_y sum_i |y - x_i| (RFA, Pillutla et al., 1912.13445), solved to convergence, without smoothing."""

    name = "geometric_median"
    weighted = True

    def __init__(self, n: int, f: int, tolerance: float = 1e-9, iterations: int = 1000) -> None:
        super().__init__(n, f)
        if not tolerance > 0 or iterations < 1:
            raise ValueError(f"geometric median needs tolerance > 0 and iterations >= 1, got {tolerance}, {iterations}")
        self.tolerance, self.iterations = tolerance, iterations

    def kappa(self, n: int, f: int) -> Kappa:
        return Kappa(4 * (1 + price(n, f)) ** 2, "bound", "Allouah et al. 2023 (2302.01772), recalled")

    def decide(self, view: View) -> Decision:
        share = np.full(view.n, 1.0 / view.n) if view.weights is None else view.weights
        weights, _ = solvers.weiszfeld(view.gram, view.n, share, self.tolerance, self.iterations)
        return over_rows(view, weights)


def krum_scores(distances: F64, neighbors: int) -> F64:
    """(n,) sum of squared distances to the `neighbors` nearest others."""
    nearest = np.sort(distances, axis=1)[:, : neighbors + 1]
    out: F64 = nearest.sum(1)
    return out


class Krum(Rule):
    """The row with the least sum of squared distances to its `neighbors` nearest others (Blanchard et al., 1703.02757).

    neighbors: n-f-1 by default (as byzfl and the recent theory); the paper has n-f-2.
    """

    name = "krum"
    selected = 1

    def __init__(self, n: int, f: int, neighbors: int | None = None) -> None:
        super().__init__(n, f)
        if neighbors is not None and not 1 <= neighbors <= n - 1:
            raise ValueError(f"krum needs 1 <= neighbors <= n - 1, got neighbors={neighbors}, n={n}")
        self.neighbors = neighbors

    def kappa(self, n: int, f: int) -> Kappa | None:
        return Kappa(6 * (1 + price(n, f)), "bound", "Allouah et al. 2023 (2302.01772), recalled; for n-f neighbours")

    def count(self, n: int, f: int) -> int:
        return 1

    def decide(self, view: View) -> Decision:
        neighbors = view.n - view.f - 1 if self.neighbors is None else min(self.neighbors, view.n - 1)
        scores = krum_scores(squared_distances(view.gram, view.n), neighbors)
        return average(view, np.argsort(scores, kind="stable")[: self.count(view.n, view.f)])


class MultiKrum(Krum):
    """The mean of the n - f rows with the best Krum scores (`selected` of them if given)."""

    name = "multi_krum"

    def __init__(self, n: int, f: int, neighbors: int | None = None, selected: int | None = None) -> None:
        super().__init__(n, f, neighbors)
        if selected is not None and not 1 <= selected <= n:
            raise ValueError(f"multi krum needs 1 <= selected <= n, got selected={selected}, n={n}")
        self.m = selected

    def kappa(self, n: int, f: int) -> Kappa | None:
        return None

    def count(self, n: int, f: int) -> int:
        return n - f if self.m is None else min(self.m, n)


class CenteredClipping(Rule):
    """v <- v + (1/n) sum_i (x_i - v) min(1, tau / |x_i - v|), `iterations` times (Karimireddy et al., 2012.10333).

    v starts at the reference (the previous output) or at the origin. radius: tau; by default the median distance of the
    rows to v at each step, a heuristic without a guarantee.
    """

    name = "centered_clipping"

    def __init__(self, n: int, f: int, radius: float | None = None, iterations: int = 1) -> None:
        super().__init__(n, f)
        if radius is not None and not radius > 0:
            raise ValueError(f"centered clipping needs radius > 0, got radius={radius}")
        if iterations < 1:
            raise ValueError(f"centered clipping needs iterations >= 1, got iterations={iterations}")
        self.radius, self.iterations = radius, iterations
        self.sees = "norms" if iterations == 1 else None

    def breakdown(self, n: int) -> int:
        """n/10: the fraction of the 2021 theorem."""
        return n // 10

    def decide(self, view: View) -> Decision:
        gram, n = view.gram, view.n
        norms = np.diag(gram)
        v = np.zeros(len(gram))
        v[-1] = 1.0
        for _ in range(self.iterations):
            shift = gram @ v
            distance = np.sqrt(np.maximum(norms[:n] - 2.0 * shift[:n] + v @ shift, 0.0))
            tau = float(np.median(distance)) if self.radius is None else self.radius
            pull = np.minimum(1.0, tau / np.maximum(distance, 1e-300)) / n
            v *= 1.0 - pull.sum()
            v[:n] += pull
        return Combination(v)


class Caf(Rule):
    """Covariance-bound agnostic filter (Allouah et al. 2025): soft-removes rows along the top direction of the covariance.

    Exact eigenvectors, maximum over active rows only, so it ends and is deterministic on any input.
    """

    name = "caf"

    def decide(self, view: View) -> Decision:
        return over_rows(view, solvers.covariance_filter(view.gram, view.n, view.f))
