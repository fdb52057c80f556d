"""No rule beats the lower bound: the two indistinguishable worlds of spec 2.4, rows shuffled every round."""

from __future__ import annotations

import numpy as np
import pytest

from raysys.aggregation import RULES, make_rule

TOLERANCE = 0.1
"""Which of tied rows a rule takes is drawn every round, so a run meets the bound up to chance."""
CHAINS = ["nnm+trimmed_mean", "nnm+krum", "nnm+geometric_median", "bucketing+median", "arc+nnm+median"]


def instance(n, f, g, b):
    """Curvatures a, K, offset z, and curvature mu of the honest loss."""
    p = f / (n - f)
    a = 1.0
    k = a * (1 + b**2 / (1 - p - p * b**2))
    mu = (1 - p) * a + p * k
    if b == 0:
        return a, a, g / (a * np.sqrt(p * (1 - p))), mu
    z = g * mu * np.sqrt(1 - (k - a) ** 2 * p * (1 - p) / (b * mu) ** 2) / (np.sqrt(p * (1 - p)) * a * k)
    return a, k, z, mu


def error_in_both_worlds(rule, n, f, g, b, seed, rounds=200, shuffle=True):
    """Mean squared norm of the honest gradient over the last half of a run, in the world where C is honest and where C' is.

    Each world is a run of its own: the honest rows first, as simulators list them, then shuffled.
    """
    a, k, z, mu = instance(n, f, g, b)
    rng = np.random.default_rng(seed)
    p, errors = f / (n - f), []
    for sign in (1, -1):
        curvature = np.array([a] * (n - 2 * f) + [k] * (2 * f))
        offset = np.array([0.0] * (n - 2 * f) + [sign * z] * f + [-sign * z] * f)
        theta, tail = np.zeros(1), []
        for _ in range(rounds):
            gradients = curvature * (theta - offset)
            order = rng.permutation(n) if shuffle else np.arange(n)
            theta = theta - 0.2 / k * rule(gradients[order][:, None], rng=rng)
            tail.append(float((mu * theta[0] - sign * p * k * z) ** 2))
        errors.append(np.mean(tail[rounds // 2 :]))
    return np.array(errors)


def not_below(errors, bound):
    assert errors.mean() >= bound * (1 - TOLERANCE), errors / bound
    assert errors.max() >= bound * (1 - TOLERANCE), errors / bound


@pytest.mark.parametrize("spec", sorted(set(RULES) - {"bulyan"}) + CHAINS)
@pytest.mark.parametrize(("n", "f", "g", "b"), [(10, 2, 1.0, 0.0), (10, 3, 1.0, 0.6)])
def test_no_rule_beats_the_lower_bound_averaged_over_a_run_in_either_world(spec, n, f, g, b):
    not_below(error_in_both_worlds(make_rule(spec, n, f), n, f, g, b, 0), f * g**2 / (n - (2 + b**2) * f))


@pytest.mark.parametrize("spec", ["multi_krum", "mda", "nnm+trimmed_mean"])
def test_without_the_shuffle_ties_betray_the_honest_and_the_bound_is_beaten(spec):
    errors = error_in_both_worlds(make_rule(spec, 10, 3), 10, 3, 1.0, 0.0, 0, shuffle=False)
    with pytest.raises(AssertionError):
        not_below(errors, 3 / (10 - 6))
    assert errors.max() < 0.5 * 3 / (10 - 6)


@pytest.mark.parametrize("spec", ["trimmed_mean", "median"])
def test_coordinate_rules_attain_the_lower_bound(spec):
    error = error_in_both_worlds(make_rule(spec, 10, 2), 10, 2, 1.0, 0.0, 0)
    np.testing.assert_allclose(error, 2 / (10 - 4), rtol=1e-9)
