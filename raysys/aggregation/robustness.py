"""Robustness coefficients in closed form (spec 2.3 to 2.5), each with what it is and where it comes from.

kappa: |F(x) - mean_S|^2 <= kappa * (1/|S|) sum_{i in S} |x_i - mean_S|^2 for every S of n - f rows.
"""

from __future__ import annotations


def price(n: int, f: int) -> float:
    """f / (n - 2f): no rule has a smaller kappa (three-point instance, spec 2.1). Raises ValueError unless n > 2f."""
    if not 0 <= 2 * f < n:
        raise ValueError(f"kappa is finite only for n > 2f >= 0, got n={n}, f={f}")
    return f / (n - 2 * f)


def trimmed_mean_kappa(n: int, f: int, trim: int | None = None) -> float:
    """Exact kappa of the trimmed mean that trims `trim` >= f at each end: trim / (n - f - trim) (spec 2.3, 2.5).

    trim = f gives the optimum f / (n - 2f); trim > f what over-estimating f costs; trim < f has no finite kappa.
    """
    trim = f if trim is None else trim
    if not 0 <= 2 * trim < n:
        raise ValueError(f"trimmed mean needs n > 2 trim >= 0, got n={n}, trim={trim}")
    return float("inf") if trim < f else trim / (n - f - trim)


def median_kappa(n: int, f: int) -> float:
    """Exact kappa of the coordinate-wise median with mid-points: (n-1)/(n+1-2f), n odd; (n-2)/(n+2-2f), n even (spec 2.5)."""
    price(n, f)
    return (n - 1) / (n + 1 - 2 * f) if n % 2 else (n - 2) / (n + 2 - 2 * f)


def nnm_kappa(n: int, f: int, kappa: float) -> float:
    """Bound on kappa of a rule after nearest-neighbour mixing: 8f/(n-f) (kappa + 1) (2302.01772, recalled)."""
    return 8 * f / (n - f) * (kappa + 1)


def arc_kappa(n: int, f: int, kappa: float) -> float:
    """Bound on kappa of a rule after adaptive clipping: kappa + 2f/(n-2f) (2405.14432, recalled)."""
    return kappa + 2 * price(n, f)
