"""Attacks that push as far as honest distances allow, in closed form.

Attacks exist only in simulation. Notation: v = mu + gamma p with a direction p in {-mu/||mu||, -s, -sign(mu)};
peers bisect for gamma, here it is a formula (specs/byzantine.md section 2.6, items 5 and 6).

Shapes: h honest rows, d coordinates.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raysys.attacks.threat import Attack, Threat

DIRECTIONS = ("mean", "std", "sign")


def direction(honest: Tensor, name: str) -> Tensor:
    """(d,) the direction p: "mean" -mu/||mu||, "std" -s (population), "sign" -sign(mu)."""
    mean = honest.mean(0)
    if name == "mean":
        return -mean / torch.linalg.vector_norm(mean).clamp_min(torch.finfo(mean.dtype).tiny)
    return -honest.std(0, correction=0) if name == "std" else -torch.sign(mean)


def inner_products(honest: Tensor, p: Tensor) -> tuple[np.ndarray, np.ndarray, float]:
    """Gram (h, h) of the deviations x_i - mu, <p, x_i - mu> (h,) and ||p||^2, all float64."""
    rows = torch.cat([honest - honest.mean(0), p[None]])
    gram = (rows @ rows.T).double().cpu().numpy()
    return gram[:-1, :-1], gram[-1, :-1], float(gram[-1, -1])


def min_max_gamma(gram: np.ndarray, along: np.ndarray, a: float) -> float:
    """Largest gamma with max_i ||v - x_i|| <= max_ij ||x_i - x_j|| = D.

    gamma = min_i (-b_i + sqrt(b_i^2 + a (D^2 - c_i))) / a with b_i = -<p, x_i - mu>, c_i = ||x_i - mu||^2.
    """
    c = gram.diagonal()
    widest = float((c[:, None] + c[None, :] - 2.0 * gram).max())
    b = -along
    return float(((-b + np.sqrt(b**2 + a * np.maximum(widest - c, 0.0))) / a).min()) if a > 0 else 0.0


def min_sum_gamma(gram: np.ndarray, along: np.ndarray, a: float) -> float:
    """Largest gamma with sum_i ||v - x_i||^2 <= max_i sum_j ||x_i - x_j||^2 = D_s.

    gamma = sqrt((D_s - sum_i ||mu - x_i||^2) / (h ||p||^2)), because the deviations sum to zero.
    """
    c = gram.diagonal()
    largest = float(len(c) * c.max() + c.sum())  # max_i sum_j ||x_i - x_j||^2 = max_i (h c_i + sum_j c_j)
    return float(np.sqrt(max(largest - c.sum(), 0.0) / (len(c) * a))) if a > 0 else 0.0


def mirror_groups(gram: NDArray[np.float64], f: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The f honest rows at one end of the main direction, farthest first, and the rest; the end that differs more.

    gram: (h, h) of the deviations from the honest mean. With h <= f the first group is one smaller than h.
    """
    h = len(gram)
    f = min(f, h - 1)
    order = np.argsort(np.linalg.eigh(gram)[1][:, -1], kind="stable")
    ends = []
    for chosen in (order[:f], order[::-1][:f]):
        inside = np.isin(np.arange(h), chosen)
        shift = inside / max(f, 1) - ~inside / (h - f)
        ends.append((float(shift @ gram @ shift), chosen, np.flatnonzero(~inside)))
    return max(ends, key=lambda end: end[0])[1:]


class MinMax(Attack):
    """Farthest along -direction without being farther from any honest row than honest rows are from each other.

    Source: Shejwalkar & Houmansadr, NDSS 2021.
    """

    name = "min_max"
    _gamma: ClassVar = staticmethod(min_max_gamma)

    def __init__(self, direction: str = "std") -> None:
        if direction not in DIRECTIONS:
            raise ValueError(f"{self.name} needs a direction among {', '.join(DIRECTIONS)}, got {direction!r}")
        self.direction = direction

    def rows(self, honest: Tensor, threat: Threat) -> Tensor:
        p = direction(honest, self.direction)
        return honest.mean(0) + self._gamma(*inner_products(honest, p)) * p


class MinSum(MinMax):
    """Farthest along -direction with a sum of squared distances no larger than that of the worst honest row."""

    name = "min_sum"
    _gamma: ClassVar = staticmethod(min_sum_gamma)
