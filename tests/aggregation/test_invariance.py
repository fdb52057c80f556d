"""Equivariances, reductions to known rules, and outputs that must be exact (spec section 5)."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raysys.aggregation import RULES, make_rule, survey
from raysys.aggregation.linear import Combination
from raysys.aggregation.preaggregate import Arc, Bucketing, Nnm

N, F, D = 11, 2, 60
ANCHORED = {"cge", "centered_clipping"}  # these know where zero is
CHAINS = ["nnm+trimmed_mean", "nnm+geometric_median", "nnm+caf", "nnm+multi_krum"]
ALL = sorted(RULES) + CHAINS
ORTHOGONAL = [
    "mean", "geometric_median", "krum", "multi_krum", "mda", "smea", "caf", "centered_clipping", "cge", "monna", "dnc",
    "ctma", "nnm+geometric_median", "nnm+caf", "arc+nnm+multi_krum",
]  # fmt: skip
RESISTANT = [
    *sorted(set(RULES) - {"mean", "cge", "centered_clipping"}),
    "nnm+trimmed_mean", "nnm+median", "nnm+geometric_median", "nnm+krum", "nnm+caf", "nnm+nnm+meamed",
    "ctma(rule=median)", "arc+trimmed_mean", "arc+nnm+median",
]  # fmt: skip


def stack(seed=0, n=N, d=D):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d)) * np.linspace(0.5, 2, n)[:, None] + 0.3


@pytest.mark.parametrize("spec", [s for s in ALL if s not in ANCHORED])
def test_translation_moves_the_output_along(spec):
    x, c = stack(), 5 * np.random.default_rng(9).standard_normal(D)
    rule = make_rule(spec, N, F)
    np.testing.assert_allclose(rule(x + c), rule(x) + c, atol=1e-7)


@pytest.mark.parametrize("spec", [*ALL, "arc+median", "arc+nnm+caf"])
@pytest.mark.parametrize("factor", [1e-12, 3.0, 1e12])
def test_positive_scaling_scales_the_output(spec, factor):
    x = stack(1)
    rule = make_rule(spec, N, F)
    np.testing.assert_allclose(rule(factor * x) / factor, rule(x), atol=1e-7)


@pytest.mark.parametrize("spec", ORTHOGONAL)
def test_rotation_rotates_the_output(spec):
    x = stack(2)
    q = np.linalg.qr(np.random.default_rng(4).standard_normal((D, D)))[0]
    rule = make_rule(spec, N, F)
    np.testing.assert_allclose(rule(x @ q), rule(x) @ q, atol=1e-7)


@pytest.mark.parametrize("spec", [s for s in [*ALL, "arc+nnm+median"] if s != "monna"])
def test_order_of_rows_does_not_matter(spec):
    x = stack(3)
    order = np.random.default_rng(8).permutation(N)
    rule = make_rule(spec, N, F)
    np.testing.assert_allclose(rule(x[order]), rule(x), atol=1e-8)


@pytest.mark.parametrize("spec", ["median", "trimmed_mean", "meamed", "phocas", "geometric_median"])
def test_order_of_rows_does_not_matter_with_ties(spec):
    x = np.random.default_rng(0).integers(-2, 3, (N, D)).astype(float)
    order = np.random.default_rng(8).permutation(N)
    rule = make_rule(spec, N, F)
    np.testing.assert_allclose(rule(x[order]), rule(x), atol=1e-8)


@pytest.mark.parametrize(
    "spec",
    [
        "trimmed_mean",
        "multi_krum",
        "meamed",
        "phocas",
        "bulyan",
        "mda",
        "smea",
        "caf",
        "cge",
        "monna",
        "dnc",
        "ctma",
        "nnm+median",
        "nnm+krum",
        "nnm+caf",
        "nnm+mean",
    ],
)
def test_with_f_zero_it_is_the_mean(spec):
    x = stack(5)
    np.testing.assert_allclose(make_rule(spec, N, 0)(x), x.mean(0), atol=1e-9)


def test_trimmed_mean_is_the_median_when_n_is_2f_plus_1():
    x = stack(6)
    assert np.array_equal(make_rule("trimmed_mean", 11, 5)(x), make_rule("median", 11, 5)(x))


@given(st.lists(st.floats(-100, 100, allow_subnormal=False), min_size=3, max_size=13).filter(lambda v: len(v) % 2 == 1))
@settings(max_examples=60, deadline=None)
def test_one_dimensional_geometric_median_is_the_median(values):
    x = np.array(values)[:, None]
    out = make_rule("geometric_median", len(values), 0)(x)[0]
    assert abs(out - np.median(x)) <= 1e-6 * max(1.0, np.ptp(x))


def test_bucketing_of_one_is_the_identity_up_to_order():
    x = stack(7)
    out = Bucketing(N, F, size=1)(x, rng=np.random.default_rng(1))
    np.testing.assert_allclose(out, x[np.random.default_rng(1).permutation(N)], atol=1e-12)


def test_bucketing_of_n_is_the_mean():
    x = stack(7)
    np.testing.assert_allclose(Bucketing(N, F, size=N)(x), x.mean(0)[None], atol=1e-12)


def test_centered_clipping_with_a_huge_radius_is_the_mean():
    x = stack(8)
    np.testing.assert_allclose(make_rule("centered_clipping(radius=1e9)", N, F)(x), x.mean(0), atol=1e-9)


def test_nnm_then_mean_with_f_zero_is_the_mean():
    x = stack(8)
    np.testing.assert_allclose(Nnm(N, 0)(x), np.broadcast_to(x.mean(0), x.shape), atol=1e-12)


def test_arc_with_f_zero_is_the_identity():
    x = stack(8)
    np.testing.assert_allclose(Arc(N, 0)(x), x, atol=1e-12)


BAD = ["1e30", "-1e30", "inf", "nan", "mixed", "near", "zero"]
# By definition ARC clips honest rows to the norm of a short row, and DnC, which looks along one direction, sees only the
# largest of outliers of very different sizes.
EXACT = [
    (spec, bad)
    for spec in RESISTANT
    for bad in BAD
    if not ("arc" in spec and bad == "zero") and not (spec == "dnc" and bad == "mixed")
]


@pytest.mark.parametrize(("spec", "bad"), EXACT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_if_all_honest_rows_are_equal_that_row_comes_back_exactly(spec, dtype, bad):
    n, f, d = 15, 3, 37
    rng = np.random.default_rng(0)
    honest = torch.from_numpy(rng.standard_normal(d)).to(dtype)
    rows = honest.repeat(n, 1)
    places = [4, 7, 14] if "monna" in spec else rng.permutation(n)[:f].tolist()
    fill = {
        "1e30": [1e30] * 3, "-1e30": [-1e30] * 3, "inf": [float("inf")] * 3, "nan": [float("nan")] * 3,
        "mixed": [1e30, float("nan"), -7.0], "near": [0.5, 0.1, -0.2], "zero": [0.0] * 3,
    }[bad]  # fmt: skip
    for place, value in zip(places, fill, strict=True):
        rows[place] = value
    out = make_rule(spec, n, f)(rows)
    assert torch.equal(out, honest)


@pytest.mark.parametrize("spec", [s for s in sorted(RULES) if s != "centered_clipping"] + CHAINS)
def test_shares_of_the_rows_are_not_negative_and_sum_to_one(spec):
    for seed in range(5):
        weights = make_rule(spec, N, F).aggregate(stack(seed)).weights
        if weights is not None:
            assert weights.min() >= 0
            assert weights.sum() == pytest.approx(1, abs=1e-12)


@given(st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_coordinate_rules_stay_between_the_trimmed_extremes(seed):
    x = np.random.default_rng(seed).standard_cauchy((N, 16))
    ranked = np.sort(x, axis=0)
    for spec in ("median", "trimmed_mean"):
        out = make_rule(spec, N, F)(x)
        assert np.all(out >= ranked[F] - 1e-12)
        assert np.all(out <= ranked[N - F - 1] + 1e-12)


def objective(x, w):
    return np.linalg.norm(x - w @ x, axis=1).sum()


def test_weiszfeld_lowers_the_objective_at_every_step():
    x = stack(12, d=5)
    values = [
        objective(x, make_rule(f"geometric_median(iterations={t})", N, F).aggregate(x).weights) for t in range(1, 60)
    ]
    assert all(b <= a + 1e-12 for a, b in pairwise(values))


@pytest.mark.parametrize("seed", range(6))
def test_geometric_median_is_stationary(seed):
    x = np.random.default_rng(seed).standard_normal((7, 3))
    if seed % 2:
        x[3:] = x[0]  # a majority at one point
    z = make_rule("geometric_median", 7, 2)(x)
    r = np.linalg.norm(x - z, axis=1)
    pull = ((x - z)[r > 1e-9] / r[r > 1e-9, None]).sum(0)
    assert np.linalg.norm(pull) <= (r <= 1e-9).sum() + 1e-6


def test_duplicating_every_row_leaves_mean_and_geometric_median_alone():
    x = stack(13)
    for spec in ("mean", "geometric_median"):
        np.testing.assert_allclose(
            make_rule(spec, 2 * N, F)(np.repeat(x, 2, axis=0)), make_rule(spec, N, F)(x), atol=1e-7
        )


def test_decisions_of_linear_rules_are_combinations():
    seen = survey(torch.from_numpy(stack()))
    assert make_rule("krum", N, F).plan(seen).coordinate is None
    assert issubclass(Combination, tuple)
