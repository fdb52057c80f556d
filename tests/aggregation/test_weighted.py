"""Weighted forms: breakdown counts weight, equal weights change nothing, integer weights are repeated rows."""

from __future__ import annotations

import numpy as np
import pytest

from raysys.aggregation import RULES, make_rule

WEIGHTED = ["mean", "median", "trimmed_mean", "geometric_median", "ctma", "clipping(radius=3.0)+mean", "arc+median"]


def stack(n=11, d=40, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d))


@pytest.mark.parametrize("spec", WEIGHTED)
@pytest.mark.parametrize("n", [10, 11])
def test_equal_weights_change_nothing(spec, n):
    x = stack(n)
    rule = make_rule(spec, n, 2)
    np.testing.assert_allclose(rule(x, weights=np.full(n, 7.0)), rule(x), atol=1e-7)


@pytest.mark.parametrize("spec", ["mean", "median", "geometric_median"])
def test_integer_weights_are_repeated_rows(spec):
    x, times = stack(7), np.array([1, 3, 2, 1, 1, 2, 1])
    got = make_rule(spec, 7, 1)(x, weights=times)
    want = make_rule(spec, int(times.sum()), 1)(np.repeat(x, times, axis=0))
    np.testing.assert_allclose(got, want, atol=1e-7)


def test_weighted_trimmed_mean_cuts_weight_fractionally():
    x = np.array([[0.0], [1.0], [2.0], [10.0]])
    rule = make_rule("trimmed_mean(mass=0.25)", 4, 1)
    # Shares .1 .4 .3 .2: .25 off the low end leaves .25 of value 1, .25 off the high end takes 10 and .05 of value 2.
    assert rule(x, weights=np.array([1, 4, 3, 2]))[0] == pytest.approx((0.25 * 1 + 0.25 * 2) / 0.5)


def test_weighted_trimmed_mean_cuts_f_times_the_largest_share():
    x = stack(9)
    weights = np.array([3, 1, 1, 1, 1, 1, 1, 1, 1.0])
    got = make_rule("trimmed_mean", 9, 1)(x, weights=weights)
    want = make_rule(f"trimmed_mean(mass={3 / 11})", 9, 1)(x, weights=weights)
    np.testing.assert_allclose(got, want, atol=1e-12)


@pytest.mark.parametrize("spec", ["median", "trimmed_mean(mass=0.4)", "geometric_median"])
def test_breakdown_counts_weight_not_heads(spec):
    x = stack(9)
    x[:6] = 1e9  # most rows, a third of the weight
    weights = np.array([1.0] * 6 + [4.0] * 3)
    assert np.abs(make_rule(spec, 9, 1)(x, weights=weights)).max() < 10


@pytest.mark.parametrize(
    "spec", [*sorted(set(RULES) - {"mean", "median", "trimmed_mean", "geometric_median", "ctma"}), "nnm+mean"]
)
def test_rules_without_a_weighted_form_say_so(spec):
    with pytest.raises(ValueError, match="has no weighted form"):
        make_rule(spec, 11, 2)(stack(), weights=np.ones(11))


@pytest.mark.parametrize("weights", [np.ones(10), -np.ones(11), np.zeros(11), np.full(11, np.nan)])
def test_bad_weights_are_refused(weights):
    with pytest.raises(ValueError, match="weights"):
        make_rule("mean", 11, 2)(stack(), weights=weights)


def test_a_share_too_large_to_trim_is_an_error_that_names_it():
    with pytest.raises(ValueError, match=r"largest of 5 shares is 0\.6"):
        make_rule("trimmed_mean", 5, 1)(stack(5), weights=np.array([6, 1, 1, 1, 1]))


def test_norm_bounded_weighted_mean_is_the_mean_of_clipped_rows(dense):
    x, weights = 5 * stack(), np.arange(1.0, 12.0)
    got = make_rule("clipping(radius=3.0)+mean", 11, 2)(x, weights=weights)
    np.testing.assert_allclose(got, np.average(dense.clipping(x, 2, 3.0), axis=0, weights=weights), atol=1e-9)


def test_weighted_geometric_median_minimises_the_weighted_sum(dense):
    x, weights = stack(9, 5), np.arange(1.0, 10.0)
    np.testing.assert_allclose(
        make_rule("geometric_median", 9, 2)(x, weights=weights), dense.geometric_median(x, 2, weights), atol=1e-6
    )


def test_rejected_rows_take_their_weight_with_them():
    x, weights = stack(9), np.arange(1.0, 10.0)
    bad = x.copy()
    bad[4] = np.inf
    want = make_rule("mean", 8, 0)(np.delete(x, 4, axis=0), weights=np.delete(weights, 4))
    np.testing.assert_allclose(make_rule("mean", 9, 1)(bad, weights=weights), want, atol=1e-12)
