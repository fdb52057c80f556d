"""The audit: how bad can a rule be made? A search for the worst ratio in the definition of kappa (spec 2.1, appendix C).

Shapes: witness (n, d), honest (h,), h = n - f.

Notable choices
- A lower bound on the rule's true kappa, with the witness that proves it; the closed forms of `robustness` are upper bounds.
- Starts at the two-point and three-point families, which are already optimal for coordinate-wise rules, then climbs.
- Up to n = 12 every subset of n - f rows is taken as the honest one in turn, so it does not matter who was planted where.
- Works for any function (n, d) tensor -> (d,) tensor, the user's own included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch

from raysys.aggregation.gram import F64
from raysys.aggregation.robustness import price

ALL_SUBSETS = 12
"""Largest n for which every subset is tried."""


@dataclass(frozen=True)
class Audit:
    """The worst case found."""

    kappa: float
    witness: F64
    honest: np.ndarray
    evaluations: int
    lower_bound: float
    """f / (n - 2f): no rule is below."""


def kappa_search(
    rule: Callable[[torch.Tensor], torch.Tensor],
    n: int,
    f: int,
    *,
    dimension: int = 1,
    steps: int = 2000,
    seed: int = 0,
    measure: str = "trace",
) -> Audit:
    """The largest |F(x) - mean_S|^2 / spread_S found over inputs x (n, dimension) and sets S of n - f rows.

    rule: called with float64 tensors (n, dimension). steps: moves of the climb. measure: 'trace', spread is the average
    squared distance to the mean of S; 'lambda', it is the top eigenvalue of the covariance of S.
    Raises ValueError for other measures or unless n > 2f >= 0.
    """
    if measure not in ("trace", "lambda"):
        raise ValueError(f"measure is 'trace' or 'lambda', got {measure!r}")
    bound = price(n, f)
    rng = np.random.default_rng(seed)
    subsets = np.array(list(combinations(range(n), n - f)) if n <= ALL_SUBSETS else [range(n - f)])
    best, witness, honest = -1.0, np.zeros((n, dimension)), subsets[0]
    evaluations = 0

    def worst(x: F64) -> tuple[float, np.ndarray]:
        nonlocal evaluations
        evaluations += 1
        ratios = _ratios(rule(torch.from_numpy(x.copy())).numpy(), x, subsets, measure)
        return float(ratios.max()), subsets[int(np.argmax(ratios))]

    starts = []
    for x in _families(n, f, dimension, rng):
        value, chosen = worst(x)
        starts.append((value, x))
        if value > best:
            best, witness, honest = value, x, chosen
    starts.sort(key=lambda pair: -pair[0])
    climbs = max(1, min(4, steps // 200))
    for start, x in starts[:climbs]:
        value = start
        for _ in range(steps // climbs):
            trial = _move(x, rng)
            found, chosen = worst(trial)
            if found >= value:
                value, x = found, trial
                if found > best:
                    best, witness, honest = found, trial, chosen
    return Audit(best, witness, honest, evaluations, bound)


def _ratios(output: F64, x: F64, subsets: np.ndarray, measure: str) -> F64:
    """(subsets,) squared error over spread; zero where the error is rounding."""
    rows = x[subsets]
    mean = rows.mean(1)
    off = rows - mean[:, None]
    error = ((output - mean) ** 2).sum(1)
    if measure == "trace" or x.shape[1] == 1:
        spread = (off**2).sum(2).mean(1)
    else:
        spread = np.linalg.eigvalsh(np.einsum("chi,chj->cij", off, off) / rows.shape[1])[:, -1]
    size = (rows**2).sum(2).max(1)
    error = np.where(error <= 1e-24 * size, 0.0, error)
    with np.errstate(divide="ignore", invalid="ignore"):
        out: F64 = np.where(error == 0.0, 0.0, error / np.where(spread <= 1e-28 * size, 0.0, spread))
    return out


def _families(n: int, f: int, dimension: int, rng: np.random.Generator) -> Iterator[F64]:
    """Two-point honest sets with the faulty rows far out, near or mirrored; the three-point set; random ones."""
    h = n - f
    direction = np.zeros(dimension)
    direction[0] = 1.0
    for k in range(1, h):
        for place in (-1e3, -1.0, 0.0, 1.0, 2.0, 1e3):
            values = np.concatenate([np.zeros(h - k), np.ones(k), np.full(f, place)])
            yield values[:, None] * direction
    yield np.concatenate([np.zeros(n - 2 * f), np.ones(f), -np.ones(f)])[:, None] * direction
    for _ in range(8):
        yield rng.standard_normal((n, dimension))


def _move(x: F64, rng: np.random.Generator) -> F64:
    """One move of the climb: jitter a row, copy a row, jitter some rows, throw a row far out, or move a row along a line."""
    x = x.copy()
    n, d = x.shape
    scale = float(np.median(np.abs(x - np.median(x, axis=0)))) + 1e-3
    size = scale * 10.0 ** rng.uniform(-3, 0.5)
    kind = rng.integers(5)
    i, j = rng.integers(n), rng.integers(n)
    if kind == 0:
        x[i] += size * rng.standard_normal(d)
    elif kind == 1:
        x[i] = x[j]
    elif kind == 2:
        x[rng.random(n) < 0.5] += size * rng.standard_normal(d)
    elif kind == 3:
        x[i] = 10.0 ** rng.uniform(0, 3) * scale * rng.standard_normal(d)
    else:
        x[i] += rng.standard_normal() * (x[j] - x[i])
    return x
