"""Intervals: textbook values, coverage, pairing."""

from __future__ import annotations

import numpy as np
import pytest

from raysys.runtime.statistics import Interval, bootstrap, mean_ci, paired_difference


def test_the_t_interval_has_its_textbook_value() -> None:
    interval = mean_ci([1.0, 2.0, 3.0])  # t(2, 0.975) = 4.30265, s / sqrt(3) = 0.57735
    assert interval.mean == 2.0
    assert interval.n == 3
    assert interval.low == pytest.approx(2.0 - 4.302653 * 0.5773503, abs=1e-6)
    assert interval.high == pytest.approx(2.0 + 4.302653 * 0.5773503, abs=1e-6)


def test_one_repetition_has_no_interval() -> None:
    interval = mean_ci([0.5])
    assert interval == Interval(0.5, None, None, 1)
    assert not interval.above(0.0)
    assert not interval.below(1.0)


def test_equal_values_have_an_interval_of_no_width() -> None:
    assert mean_ci([0.3] * 4).low == pytest.approx(0.3)


def test_pairing_removes_what_the_seeds_share() -> None:
    rng = np.random.default_rng(0)
    seeds = rng.normal(scale=10.0, size=8)
    ours, theirs = seeds + 1 + rng.normal(scale=0.01, size=8), seeds
    assert paired_difference(ours, theirs).above(0.9)
    assert not mean_ci(ours).above(mean_ci(theirs).mean)


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    intervals = [mean_ci(rng.normal(size=5)) for _ in range(2000)]
    covered = np.mean([not i.above(0.0) and not i.below(0.0) for i in intervals])
    assert 0.93 < covered < 0.97


def test_the_bootstrap_of_the_mean_agrees_with_the_t_interval_for_many_values() -> None:
    values = np.random.default_rng(2).normal(size=400)
    one, other = bootstrap(values, np.mean, np.random.default_rng(3)), mean_ci(values)
    assert one.mean == other.mean
    assert one.low == pytest.approx(other.low, abs=0.02)
    assert one.high == pytest.approx(other.high, abs=0.02)


def test_the_bootstrap_repeats_with_its_seed() -> None:
    draws = [bootstrap([1.0, 5.0, 2.0], np.median, np.random.default_rng(4)) for _ in range(2)]
    assert draws[0] == draws[1]


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [[1.0], [2.0]]])
def test_values_that_have_no_interval_are_refused(values: object) -> None:
    with pytest.raises(ValueError, match="finite numbers"):
        mean_ci(values)  # type: ignore[arg-type]


def test_unequal_numbers_cannot_be_paired() -> None:
    with pytest.raises(ValueError, match="equally many, got 2 and 1"):
        paired_difference([1, 2], [1])
