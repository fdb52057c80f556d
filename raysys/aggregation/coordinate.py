"""Coordinate-wise rules: each column is aggregated on its own, by ranks (spec 2.5)."""

from __future__ import annotations

from raysys.aggregation.robustness import median_kappa, trimmed_mean_kappa
from raysys.aggregation.rule import Coordinatewise, Decision, Kappa, Rule, View


class Median(Rule):
    """Coordinate-wise median, mid-point for even n (Yin et al., 1803.01498). Weighted: where half of the weight is passed."""

    name = "median"
    needs_products = False
    weighted = True

    def kappa(self, n: int, f: int) -> Kappa:
        return Kappa(median_kappa(n, f), "exact", "spec 2.5, proved there")

    def decide(self, view: View) -> Decision:
        return Coordinatewise("median", weights=view.weights)


class TrimmedMean(Rule):
    """Coordinate-wise mean without the f smallest and f largest values (Yin et al., 1803.01498).

    Weighted: weight `mass` is cut from either end, fractionally, f times the largest share by default.
    """

    name = "trimmed_mean"
    needs_products = False
    weighted = True

    def __init__(self, n: int, f: int, mass: float | None = None) -> None:
        super().__init__(n, f)
        if mass is not None and not 0 <= mass < 0.5:
            raise ValueError(f"trimmed mean needs 0 <= mass < 1/2, got mass={mass}")
        self.mass = mass

    def kappa(self, n: int, f: int) -> Kappa:
        """trim / (n - f - trim) when f rows are faulty and `trim` = self.f are cut at either end; inf if trim < f.

        ValueError unless n > 2 trim. With trim = f it is the optimum of any rule.
        """
        what = "; the optimum of any rule" if self.f == f else f", told f={self.f}"
        return Kappa(trimmed_mean_kappa(n, f, self.f), "exact", f"spec 2.5, proved there{what}")

    def decide(self, view: View) -> Decision:
        if view.weights is None:
            return Coordinatewise("trimmed", f=view.f)
        mass = view.f * float(view.weights.max()) if self.mass is None else self.mass
        if 2 * mass >= 1:
            raise ValueError(
                f"weighted trimmed mean cuts {mass:.3g} of the weight from either end and needs less than 1/2; "
                f"the largest of {view.n} shares is {view.weights.max():.3g} with f={view.f}: cap the weights or set mass"
            )
        return Coordinatewise("trimmed", weights=view.weights, mass=mass)


class MeaMed(Rule):
    """Coordinate-wise mean of the n - f values nearest the median (Xie et al., 1802.10116)."""

    name = "meamed"
    needs_products = False

    def decide(self, view: View) -> Decision:
        return Coordinatewise("near_median", keep=view.n - view.f)


class Phocas(Rule):
    """Coordinate-wise mean of the n - f values nearest the trimmed mean (Xie et al., 1805.09682)."""

    name = "phocas"
    needs_products = False

    def decide(self, view: View) -> Decision:
        return Coordinatewise("near_trimmed", f=view.f, keep=view.n - view.f)
