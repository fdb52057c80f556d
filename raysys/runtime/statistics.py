"""Intervals for what is repeated over seeds. Every claim that a job prints rests on these.

Notable choices
- Few repetitions (3 to 20) of a continuous measurement: Student's t, two-sided.
- Methods are compared on the same seeds, so their differences are paired: what the seeds have in common cancels.
- The bootstrap (percentile; Efron & Tibshirani 1993, ch. 13) is for statistics that are not means, and for larger n.

Shapes: n repetitions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval; with one repetition the interval is unbounded (None)."""

    mean: float
    low: float | None
    high: float | None
    n: int
    level: float = 0.95

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.mean:.4g} (n={self.n})"
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}] (n={self.n})"

    def above(self, value: float) -> bool:
        """Whether the whole interval lies above `value`."""
        return self.low is not None and self.low > value

    def below(self, value: float) -> bool:
        """Whether the whole interval lies below `value`."""
        return self.high is not None and self.high < value


def _sample(values: ArrayLike, level: float) -> NDArray[np.float64]:
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or sample.size == 0 or not np.isfinite(sample).all():
        raise ValueError(f"an interval needs a list of one or more finite numbers, got {values!r}")
    if not 0 < level < 1:
        raise ValueError(f"the level must lie between 0 and 1, got {level}")
    return sample


def mean_ci(values: ArrayLike, level: float = 0.95) -> Interval:
    """Mean of (n,) values and its two-sided t interval: mean ± t_{n-1, (1+level)/2} s / sqrt(n)."""
    sample = _sample(values, level)
    n, mean = sample.size, float(sample.mean())
    if n == 1:
        return Interval(mean, None, None, 1, level)
    half = float(stdtrit(n - 1, (1 + level) / 2) * sample.std(ddof=1) / np.sqrt(n))
    return Interval(mean, mean - half, mean + half, n, level)


def paired_difference(ours: ArrayLike, theirs: ArrayLike, level: float = 0.95) -> Interval:
    """Interval of the mean of ours - theirs, where the i-th entries of both share a seed."""
    first, second = _sample(ours, level), _sample(theirs, level)
    if first.size != second.size:
        raise ValueError(f"paired values must be equally many, got {first.size} and {second.size}")
    return mean_ci(first - second, level)


def bootstrap(
    values: ArrayLike,
    statistic: Callable[[NDArray[np.float64]], float],
    rng: np.random.Generator,
    level: float = 0.95,
    resamples: int = 2000,
) -> Interval:
    """Percentile bootstrap interval of statistic((n,) values) -> number; `mean` holds the statistic of the sample itself."""
    sample = _sample(values, level)
    if sample.size == 1:
        return Interval(float(statistic(sample)), None, None, 1, level)
    drawn = rng.integers(0, sample.size, (resamples, sample.size))
    replicates = np.array([statistic(sample[row]) for row in drawn])
    low, high = np.quantile(replicates, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(statistic(sample)), float(low), float(high), sample.size, level)


def paired_bootstrap(
    ours: ArrayLike, theirs: ArrayLike, rng: np.random.Generator, level: float = 0.95, resamples: int = 2000
) -> Interval:
    """Interval of the mean of ours - theirs, (s, m) values of s seeds on the same m items, both resampled.

    Seeds and items are drawn with replacement, independently (a two-way percentile bootstrap; Owen 2007): it answers for
    other seeds and for other test items at once. With one seed it answers for other items only.
    """
    difference = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
    if difference.ndim != 2 or not difference.size or not np.isfinite(difference).all():
        raise ValueError(f"a paired bootstrap needs finite values by seed and item, got shape {difference.shape}")
    seeds, items = difference.shape
    by_seed = rng.multinomial(seeds, np.full(seeds, 1 / seeds), resamples) / seeds
    by_item = rng.multinomial(items, np.full(items, 1 / items), resamples) / items
    replicates = ((by_seed @ difference) * by_item).sum(1)
    low, high = np.quantile(replicates, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(difference.mean()), float(low), float(high), seeds, level)
