"""No rule beats the lower bound: the two indistinguishable worlds of spec 2.4, rows shuffled every round."""

from __future__ import annotations

import numpy as np
import pytest

from raysys.aggregation import RULES, make_rule

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


def error_in_both_worlds(rule, n, f, g, b, seed, rounds=120):
    """Squared norm of the honest gradient at the output, in the world where C is honest and where C' is."""
    a, k, z, mu = instance(n, f, g, b)
    rng = np.random.default_rng(seed)
    curvature = np.array([a] * (n - 2 * f) + [k] * (2 * f))
    offset = np.array([0.0] * (n - 2 * f) + [z] * f + [-z] * f)
    theta = np.zeros(1)
    for _ in range(rounds):
        gradients = (curvature * (theta - offset))[rng.permutation(n)]
        theta = theta - 0.5 / k * rule(gradients[:, None], rng=rng)
    p = f / (n - f)
    return [float((mu * theta[0] - sign * p * k * z) ** 2) for sign in (1, -1)]


@pytest.mark.parametrize("spec", sorted(set(RULES) - {"bulyan"}) + CHAINS)
@pytest.mark.parametrize(("n", "f", "g", "b"), [(10, 2, 1.0, 0.0), (10, 3, 1.0, 0.6)])
def test_no_rule_beats_the_lower_bound_in_the_worse_world_nor_on_average(spec, n, f, g, b):
    # Averaging over orders as well: a rule that breaks ties by index must not look better than the bound.
    bound = f * g**2 / (n - (2 + b**2) * f)
    rule = make_rule(spec, n, f)
    errors = np.array([error_in_both_worlds(rule, n, f, g, b, seed) for seed in range(2)])
    assert errors.max(1).min() >= bound * (1 - 1e-6)
    assert errors.mean() >= bound * (1 - 1e-6)


@pytest.mark.parametrize("spec", ["trimmed_mean", "median"])
def test_coordinate_rules_attain_the_lower_bound(spec):
    error = error_in_both_worlds(make_rule(spec, 10, 2), 10, 2, 1.0, 0.0, 0)
    np.testing.assert_allclose(error, 2 / (10 - 4), rtol=1e-9)
