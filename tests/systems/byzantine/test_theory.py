import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysys.aggregation import make_rule
from raysys.systems.byzantine import theory
from raysys.systems.byzantine.dissimilarity import (
    dissimilarity,
    fit_dissimilarity,
    fit_noise,
    planted_quadratics,
    predicted_floor,
    smallest_G,
)
from raysys.systems.byzantine.lower_bound import breakdown_instance, lower_bound_instance, noise_instance

ROWS = [
    (20, 4, 1.0, 0.0, 1 / 3),
    (20, 4, 1.0, 1.0, 0.5),
    (20, 6, 0.5, 0.8, 0.36057692307692),
    (11, 2, 2.0, 1.5, 3.2),
    (100, 30, 1.0, 1.0, 3.0),
]


@pytest.mark.parametrize(("n", "f", "G", "B", "bound"), ROWS)
def test_lower_bound_rows(n, f, G, B, bound):
    assert theory.lower_bound(n, f, G, B) == pytest.approx(bound, rel=1e-12)
    instance = lower_bound_instance(n, f, G, B)
    assert instance.floor == pytest.approx(bound, rel=1e-12)
    assert (instance.honest_gradient(np.zeros(1)) ** 2)[:, 0] == pytest.approx([bound, bound], rel=1e-12)


@pytest.mark.parametrize(("n", "f", "G", "B", "bound"), ROWS)
def test_appendix_a_slack_is_zero_at_one_point_and_never_negative(n, f, G, B, bound):
    instance = lower_bound_instance(n, f, G, B)
    theta = np.linspace(-50, 50, 200_001)
    room = G**2 + B**2 * instance.honest_gradient(theta) ** 2
    slack = (room - instance.dissimilarity(theta)) / np.maximum(room, 1.0)
    assert slack.min() >= -1e-12
    if B > 0:
        u, beta = instance.smoothness - 1.0, instance.smoothness * instance.centre[instance.n - 2 * f]
        p = f / (n - f)
        b2 = B**2 * instance.mu**2 / (p * (1 - p))
        tight = (-u * beta / (b2 - u**2) + p * beta) / instance.mu  # theta where world 0 has no slack
        at = np.array([tight])
        gap = G**2 + B**2 * instance.honest_gradient(at)[0] ** 2 - instance.dissimilarity(at)[0]
        assert gap[0] == pytest.approx(0.0, abs=1e-12 * max(1.0, float(instance.dissimilarity(at)[0, 0])))
    else:
        assert slack == pytest.approx(0.0, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.integers(5, 60), st.floats(0.01, 0.99), st.floats(0.1, 5), st.floats(0, 2.5))
def test_the_instance_satisfies_its_dissimilarity_and_meets_the_bound(n, share, G, B):
    f = max(1, int(share * n / (2 + B**2)))
    if math.isinf(theory.lower_bound(n, f, G, B)) or 2 * f >= n:
        return
    instance = lower_bound_instance(n, f, G, B)
    theta = np.linspace(-5, 5, 2001) * max(instance.minimiser, 1e-9)
    room = G**2 + B**2 * instance.honest_gradient(theta) ** 2
    assert ((room - instance.dissimilarity(theta)) / room.max()).min() > -1e-10
    assert (instance.honest_gradient(theta) ** 2).mean(0).min() >= instance.floor * (1 - 1e-9)
    assert instance.honest_gradient(np.array([instance.minimiser]))[0, 0] == pytest.approx(0.0, abs=1e-9 * G * n)


def test_both_worlds_send_the_same_gradients_and_differ_in_who_is_honest():
    instance = lower_bound_instance(20, 4, 1.0, 1.0)
    assert instance.worlds.sum(1).tolist() == [16, 16]
    assert (instance.worlds[0] != instance.worlds[1]).sum() == 8
    gradients = instance.gradients(np.array([0.3]))
    assert gradients[instance.worlds[0]].mean() != gradients[instance.worlds[1]].mean()


@pytest.mark.parametrize(("n", "f"), [(10, 1), (10, 4), (20, 7)])
@pytest.mark.parametrize("B", [0.0, 0.3, 0.7])
def test_the_upper_bound_with_the_smallest_kappa_is_the_lower_bound(n, f, B):
    lower = theory.lower_bound(n, f, 1.3, B)
    assert theory.floor_without_momentum(theory.kappa_limit(n, f), 1.3, B) == pytest.approx(lower)
    assert theory.error_floor(make_rule("trimmed_mean", n, f), n, f, 1.3, B) == pytest.approx(lower)


@pytest.mark.parametrize("B", [0.0, 0.5, 1.0, 1.5])
def test_the_bound_explodes_at_the_breakdown_point(B):
    n = 10_000_000
    edge = theory.breakdown(B)
    assert edge == pytest.approx(1 / (2 + B * B))
    near = [theory.lower_bound(n, int(n * edge * share), 1.0, B) for share in (0.9, 0.99, 0.999)]
    assert near[1] > 9 * near[0]
    assert near[2] > 9 * near[1]
    f = math.ceil(n * edge + 1e-9)
    if 2 * f < n:
        assert math.isinf(theory.lower_bound(n, f, 1.0, B))


def test_beyond_breakdown_the_floor_grows_without_heterogeneity_offset():
    instance = breakdown_instance(20, 8, 1.0, 100.0)
    theta = np.linspace(-300, 300, 2001)
    assert (instance.honest_gradient(theta) ** 2 - instance.dissimilarity(theta)).min() > -1e-9  # (0, 1)-dissimilar
    assert instance.floor == pytest.approx((8 / 12 * 100) ** 2)
    with pytest.raises(ValueError, match=r"0\.3333 <= f/n"):
        breakdown_instance(20, 6, 1.0, 1.0)
    with pytest.raises(ValueError, match=r"f/n < 1/\(2 \+ B\^2\) = 0\.3333, got n=20, f=7"):
        lower_bound_instance(20, 7, 1.0, 1.0)


@pytest.mark.parametrize(("f", "floor"), [(2, 0.125), (4, 1 / 3), (6, 0.75), (8, 2.0)])
def test_noise_rows(f, floor):
    instance = noise_instance(20, f, 1.0)
    assert instance.floor == pytest.approx(floor)
    theta, rng = np.array([0.4]), np.random.default_rng(0)
    draws = np.concatenate([instance.honest_gradients(theta, rng) for _ in range(4000)], axis=1)
    assert np.abs(draws.mean(0) - theta).max() < 1e-12  # the honest mean is noise-free
    assert draws.var() == pytest.approx(1.0, rel=1e-9)
    assert draws[0].mean() == pytest.approx(0.4, abs=0.06)
    assert instance.byzantine(theta) == pytest.approx(draws.min() - instance.z)


@pytest.mark.parametrize(("alpha", "factor"), [(1.0, 1.0), (0.1, 1 / 19), (0.01, 1 / 199), (0.5, 1 / 3)])
def test_momentum_factor_rows(alpha, factor):
    assert theory.momentum_factor(alpha) == pytest.approx(factor)
    with pytest.raises(ValueError, match=r"\(0, 1\], got 1.5"):
        theory.momentum_factor(1.5)


def test_momentum_factor_is_the_variance_of_an_exponential_average():
    rng, alpha = np.random.default_rng(0), 0.2
    noise, m, seen = rng.standard_normal((3000, 200)), 0.0, []
    for t, draw in enumerate(noise):
        m = (1 - alpha) * m + alpha * draw
        if t > 200:
            seen.append(np.square(m).mean())
    assert np.mean(seen) == pytest.approx(theory.momentum_factor(alpha), rel=0.02)


def test_floors_reduce_to_each_other():
    assert theory.floor_with_momentum(0.5, 1.2, 0.4, 0.0, 0.1) == pytest.approx(
        theory.floor_without_momentum(0.5, 1.2, 0.4)
    )
    assert theory.floor_without_momentum(0.75, 0.0, 0.0, 1.0) == pytest.approx(0.75)
    assert theory.floor_without_momentum(0.75, 0.0, 0.0, 1.0, h=4) == pytest.approx(0.75 * 0.75)
    assert theory.floor_with_momentum(0.75, 0.0, 0.0, 1.0, 0.5) == pytest.approx(0.25)
    assert theory.error_floor(0.0, 10, 0, 1.0, 1.0) == 0.0
    assert math.isinf(theory.error_floor(1.0, 10, 2, 1.0, 1.0))
    assert theory.loss_floor(0.5, 10, 2, 1.0, 0.0, mu=0.25) == pytest.approx(1.0)
    assert theory.loss_lower_bound(20, 4, 1.0, 0.0, mu=0.5) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="no known kappa"):
        theory.error_floor(make_rule("meamed", 10, 2), 10, 2, 1.0, 0.0)


def test_upper_bounds_tend_to_their_floors():
    bound = theory.nonconvex_bound(0.25, 1.0, 0.5, 1.0, h=8, L=1.0, gamma=1e-6, T=10**12, gap=1.0)
    assert bound == pytest.approx(theory.floor_without_momentum(0.25, 1.0, 0.5, 1.0, h=8), rel=1e-3)
    bound = theory.pl_bound(0.25, 1.0, 0.5, 1.0, h=8, L=1.0, mu=0.5, gamma=1e-5, T=10**8, gap=1.0)
    assert bound == pytest.approx(theory.floor_without_momentum(0.25, 1.0, 0.5, 1.0, h=8) / (2 * 0.5), rel=1e-3)
    with pytest.raises(ValueError, match=r"gamma <= 1/L = 0\.5"):
        theory.nonconvex_bound(0.25, 1, 0, 0, 8, 2.0, 0.6, 10, 1.0)
    assert math.isinf(theory.pl_bound(4.0, 1, 1, 0, 8, 1.0, 0.5, 0.1, 10, 1.0))


def test_momentum_bias_settles_where_its_recursion_says():
    bias, alpha, sigma, h = 1.0, 0.1, 2.0, 10
    for _ in range(500):
        bias = theory.momentum_bias(bias, alpha, sigma, h, L=1.0, gamma=0.0, update=0.0)
    assert bias == pytest.approx(alpha * sigma**2 / h)


@pytest.mark.parametrize(
    ("n", "b", "s", "b_hat"),
    [(100, 10, 15, 7), (100, 10, 20, 8), (100, 10, 30, 9), (100, 20, 30, 15), (1000, 100, 30, 13), (30, 6, 15, 6)],
)
def test_rpel_b_hat_table(n, b, s, b_hat):
    assert theory.rpel_b_hat(n, b, s, T=200, fail=0.05) == b_hat


def test_subsampled_f_covers_what_is_drawn():
    n, f, sampled, T = 100, 10, 20, 50
    f_hat = theory.subsampled_f(n, f, sampled, T, 0.05)
    rng = np.random.default_rng(0)
    exceeded = sum(max((rng.permutation(n)[:sampled] < f).sum() for _ in range(T)) > f_hat for _ in range(100))
    assert exceeded <= 12
    assert theory.subsampled_f(n, f, n, T, 0.05) == f
    assert theory.subsampled_f(n, 0, 5, T, 0.05) == 0
    for call in (
        lambda: theory.subsampled_f(10, 2, 11, 5, 0.1),
        lambda: theory.rpel_b_hat(10, 2, 10, 5, 0.1),
        lambda: theory.rpel_b_hat(10, 2, 5, 5, 1.5),
    ):
        with pytest.raises(ValueError, match="needs"):
            call()


@pytest.mark.parametrize(("n", "f", "f_hat", "kappa"), [(20, 2, 6, 0.5), (15, 1, 6, 0.75), (20, 0, 4, 0.25)])
def test_misspecified_kappa_rows(n, f, f_hat, kappa):
    assert theory.misspecified_kappa(n, f, f_hat) == pytest.approx(kappa)
    assert math.isinf(theory.misspecified_kappa(n, f_hat, f))


@settings(max_examples=30, deadline=None)
@given(st.integers(3, 12), st.integers(1, 6), st.floats(0, 3), st.floats(0, 2), st.integers(0, 10**6))
def test_planted_quadratics_have_their_dissimilarity_at_every_point(h, d, G, B, seed):
    rng = np.random.default_rng(seed)
    problem = planted_quadratics(h, d, G, B, rng)
    for scale in (0.0, 1.0, 30.0):
        theta = scale * rng.standard_normal(d)
        spread, squared = dissimilarity(problem.gradients(theta))
        assert spread == pytest.approx(G**2 + B**2 * squared, rel=1e-9, abs=1e-9)
        assert problem.gradients(theta).mean(0) == pytest.approx(problem.Q @ theta, abs=1e-9)


@pytest.mark.parametrize(("G", "B"), [(1.0, 0.0), (0.7, 0.4), (0.0, 1.0), (2.0, 1.5)])
def test_estimators_return_the_planted_dissimilarity_along_a_trajectory(G, B):
    problem = planted_quadratics(8, 5, G, B, np.random.default_rng(1))
    theta, seen = np.full(5, 3.0), []
    for _ in range(40):
        gradients = problem.gradients(theta)
        seen.append(dissimilarity(gradients))
        theta = theta - 0.3 * gradients.mean(0)
    fit = fit_dissimilarity(*np.array(seen).T)
    np.testing.assert_allclose([fit.G, fit.B], [G, B], atol=1e-6)
    assert fit.envelope == pytest.approx(G, abs=1e-5)
    assert fit.residual < 1e-6
    predicted = predicted_floor(0.2, 10, 2, fit, sigma=0.0)
    assert predicted == pytest.approx(theory.error_floor(0.2, 10, 2, G, B), abs=1e-5)


@pytest.mark.parametrize("B", [0.0, 0.5, 1.0])
def test_estimators_return_the_planted_G_of_the_lower_bound_instance(B):
    instance = lower_bound_instance(20, 4, 1.3, B)
    theta = np.linspace(-4, 4, 4001) * instance.minimiser
    spread, squared = instance.dissimilarity(theta)[0], instance.honest_gradient(theta)[0] ** 2
    assert smallest_G(spread, squared, B) == pytest.approx(1.3, rel=1e-3)
    if B == 0.0:
        fit = fit_dissimilarity(spread, squared)
        np.testing.assert_allclose([fit.G, fit.B], [1.3, 0.0], atol=1e-6)


def test_noise_estimator_returns_sigma():
    draws = np.random.default_rng(0).standard_normal((200, 6, 10)) * 0.3 + np.arange(6)[:, None]
    assert fit_noise(draws) == pytest.approx(0.3 * math.sqrt(10), rel=0.03)
    with pytest.raises(ValueError, match="at least two draws"):
        fit_noise(draws[:1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: theory.lower_bound(10, 5, 1, 0), "0 <= 2f < n, got n=10, f=5"),
        (lambda: theory.lower_bound(10, 1, -1, 0), "G=-1"),
        (lambda: noise_instance(10, 0, 1.0), "0 < 2f < n"),
        (lambda: lower_bound_instance(10, 0, 1.0, 0.0), "f=0"),
        (lambda: planted_quadratics(2, 3, 1, 1, np.random.default_rng(0)), "h >= 3"),
        (lambda: planted_quadratics(5, 3, 1, 1, np.random.default_rng(0), (0.0, 1.0)), "0 < low <= high"),
        (lambda: fit_dissimilarity(np.ones(1), np.ones(1)), "at least two points"),
    ],
)
def test_wrong_numbers_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
