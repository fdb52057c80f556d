"""Rules that keep some rows by their distances, norms or projections, and average them (spec 2.5).

Shapes: gram (m, m), rows first, then the origin, then the reference if there is one; distances (n, n) squared.
"""

from __future__ import annotations

from math import comb, floor

import numpy as np

from raysys.aggregation import solvers
from raysys.aggregation.columns import Coordinatewise
from raysys.aggregation.gram import BLOCK, F64
from raysys.aggregation.linear import average, krum_scores, over_rows
from raysys.aggregation.robustness import price
from raysys.aggregation.rule import Combination, Decision, Kappa, Rule, View, norms_of, squared_distances

SUBSETS = 200_000
"""Most subsets MDA and SMEA look through."""


class Subset(Rule):
    """The mean of the best of all subsets of n - f rows."""

    def requires(self, n: int, f: int) -> None:
        super().requires(n, f)
        if comb(n, f) > SUBSETS:
            raise ValueError(
                f"{self.name} looks at every subset of n - f rows and takes {SUBSETS} at most, got n={n}, f={f} "
                f"with {comb(n, f)}; caf and ctma do without"
            )


class Mda(Subset):
    """The mean of the n - f rows of least diameter (minimum-diameter averaging; RESAM, 2205.12173)."""

    name = "mda"

    def decide(self, view: View) -> Decision:
        return average(view, solvers.least_diameter(squared_distances(view.gram, view.n), view.n - view.f))


class Smea(Subset):
    """The mean of the n - f rows whose covariance has the least top eigenvalue (Allouah et al., ICML 2023)."""

    name = "smea"

    def kappa(self, n: int, f: int) -> Kappa:
        return Kappa(4 * f / (n - f) * (1 + price(n, f)) ** 2, "bound-lambda", "Allouah et al. 2023 (SMEA), recalled")

    def decide(self, view: View) -> Decision:
        n = view.n
        return average(view, solvers.least_variance(np.ascontiguousarray(view.gram[:n, :n]), n - view.f))


class Cge(Rule):
    """Comparative gradient elimination: the mean of the n - f rows of least norm. Not translation-equivariant, no kappa."""

    name = "cge"
    sees = "norms"

    def breakdown(self, n: int) -> int:
        """Below n/3 (spec 2.5, recalled)."""
        return (n - 1) // 3

    def decide(self, view: View) -> Decision:
        return average(view, np.argsort(norms_of(view), kind="stable")[: view.n - view.f])


class Monna(Rule):
    """The mean of the n - f rows nearest to the trusted row `index`, itself included (2209.10931).

    For a node that knows which row is its own. A server that shuffles its rows has none to trust (`trusts_first`).

    The error is at most 4f/h times the mean squared distance of the honest rows to that row (spec 2.5).
    """

    name = "monna"
    trusts_first = True

    def __init__(self, n: int, f: int, index: int = 0) -> None:
        super().__init__(n, f)
        if not 0 <= index < n:
            raise ValueError(f"monna needs 0 <= index < n, got index={index}, n={n}")
        self.index = index

    def decide(self, view: View) -> Decision:
        place = np.flatnonzero(view.rows == self.index)
        if len(place) == 0:
            raise ValueError(f"monna trusts row {self.index}, which is not finite or not there (n={view.n})")
        distances = squared_distances(view.gram, view.n)[place[0]]
        distances[place[0]] = -1.0  # itself first, also among duplicates
        return average(view, np.argsort(distances, kind="stable")[: view.n - view.f])


class Dnc(Rule):
    """Divide and conquer (Shejwalkar & Houmansadr 2021): drops the rows that stick out along the top singular direction.

    Each of `iterations` looks at about `coordinates` columns, drawn as whole blocks so that the Gram can serve, drops
    ceil(filter * f) rows, and the rows that survive every time are averaged.
    """

    name = "dnc"

    def __init__(self, n: int, f: int, iterations: int = 3, coordinates: int = 10_000, filter: float = 1.0) -> None:
        super().__init__(n, f)
        if iterations < 1 or coordinates < 1 or not filter > 0 or not filter * f < n / 2:
            raise ValueError(
                f"dnc needs iterations >= 1, coordinates >= 1, filter > 0 and filter * f < n/2, "
                f"got {iterations}, {coordinates}, {filter} with n={n}, f={f}"
            )
        self.iterations, self.coordinates, self.filter = iterations, coordinates, filter

    def decide(self, view: View) -> Decision:
        rng = np.random.default_rng(0) if view.rng is None else view.rng
        n, dropped = view.n, min(-floor(-self.filter * view.f), (view.n - 1) // 2)
        grams = view.survey.grams
        assert grams is not None
        drawn = min(len(grams), -(-self.coordinates // BLOCK))
        survived = np.zeros(n, np.int64)
        times = 1 if drawn == len(grams) else self.iterations
        for _ in range(times):
            blocks = slice(None) if drawn == len(grams) else np.sort(rng.choice(len(grams), drawn, replace=False))
            gram = view.survey.gram_of(blocks)[:n, :n]
            centred = gram - gram.mean(0) - gram.mean(1)[:, None] + gram.mean()
            # The projections of the rows on the top right singular vector are the top eigenvector, scaled.
            scores = np.linalg.eigh(centred)[1][:, -1] ** 2
            survived[np.argsort(scores, kind="stable")[: n - dropped]] += 1
        return average(view, np.flatnonzero(survived == survived.max()))


class Ctma(Rule):
    """Centred trimmed meta-aggregation (Dahan & Levy 2024): the mean of the n - f rows nearest to another rule's output.

    rule: a rule decided on inner products, or `median` (not after a pre-aggregator: the survey knows the distances to the
    median of the rows as they came). Weighted: nearest rows up to weight 1 - f times the largest share, the last in part.
    """

    name = "ctma"
    weighted = True

    def __init__(self, n: int, f: int, rule: str = "geometric_median") -> None:
        from raysys.aggregation.registry import make_rule

        super().__init__(n, f)
        self.inner = make_rule(rule, n, f)
        last = getattr(self.inner, "rule", self.inner)  # of a chain, what decides
        linear = last.plannable and (last.needs_products or last.name == "mean") and not isinstance(last, Bulyan)
        if not (linear or self.inner.name == "median"):
            raise ValueError(f"ctma needs a rule decided on inner products or median, got rule={rule}")
        self.trusts_first = self.inner.trusts_first  # type: ignore[misc]

    def requires(self, n: int, f: int) -> None:
        super().requires(n, f)
        if hasattr(self, "inner"):
            self.inner.requires(n, f)

    def decide(self, view: View) -> Decision:
        gram, n = view.gram, view.n
        if self.inner.name == "median":
            if view.mixed or view.weights is not None:
                what = "after a pre-aggregator" if view.mixed else "with weights"
                raise ValueError(f"ctma(rule=median) does not work {what}; use ctma(rule=geometric_median)")
            distances = np.diag(gram)[:n].copy()
        else:
            centre, matrix = self.inner.compose(view)
            if not isinstance(centre, Combination):
                raise ValueError(f"ctma needs a rule decided on inner products or median, got {self.inner.name}")
            a = centre.coefficients if matrix is None else centre.coefficients @ matrix
            a[n] += 1.0 - a.sum()
            shift = gram @ a
            distances = np.maximum(np.diag(gram) - 2.0 * shift + a @ shift, 0.0)[:n]
        order = np.argsort(distances, kind="stable")
        if view.weights is None:
            return average(view, order[: n - view.f])
        mass = 1.0 - view.f * float(view.weights.max())
        if mass <= 0.5:
            raise ValueError(
                f"weighted ctma keeps {mass:.3g} of the weight and needs more than 1/2; the largest of {n} shares is "
                f"{view.weights.max():.3g} with f={view.f}: cap the weights"
            )
        sorted_shares = view.weights[order]
        before = np.cumsum(sorted_shares) - sorted_shares
        kept = np.zeros(n)
        kept[order] = np.clip(mass - before, 0.0, sorted_shares)
        return over_rows(view, kept / kept.sum())


def bulyan_selection(distances: F64, count: int, f: int) -> np.ndarray:
    """`count` rows picked one by one, each the Krum row of those that are left."""
    left = np.arange(len(distances))
    chosen = []
    for _ in range(count):
        scores = krum_scores(distances[np.ix_(left, left)], max(1, len(left) - f - 1))
        place = int(np.argmin(scores))
        chosen.append(left[place])
        left = np.delete(left, place)
    return np.sort(np.array(chosen))


class Bulyan(Rule):
    """n - 2f rows picked by Krum one after the other, then per coordinate the mean of the n - 4f values nearest their median.

    El Mhamdi et al., 1802.07927.
    """

    name = "bulyan"

    def requires(self, n: int, f: int) -> None:
        if n < 4 * f + 3:
            raise ValueError(f"bulyan needs n >= 4f + 3, got n={n}, f={f}")

    def decide(self, view: View) -> Decision:
        count = view.n - 2 * view.f
        rows = bulyan_selection(squared_distances(view.gram, view.n), count, view.f)
        return Coordinatewise("near_median", keep=count - 2 * view.f, rows=rows)
