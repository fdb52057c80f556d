"""The worked example of the spec's appendix B, and every rule against its dense definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from raysys.aggregation import RULES, make_rule, survey
from raysys.aggregation.preaggregate import Arc, Bucketing, Clipping, Nnm

X = [(0, 0), (1, 0), (0, 1), (1, 1), (0.5, 0.25), (10, -10), (9, -8)]
CENTRE = (0.5, 0.45)

APPENDIX_B = {
    "median": (1, 0),
    "trimmed_mean": (0.833333, 0.083333),
    "meamed": CENTRE,
    "multi_krum": CENTRE,
    "multi_krum(selected=5)": CENTRE,
    "mda": CENTRE,
    "smea": CENTRE,
    "nnm+median": CENTRE,
    "nnm+trimmed_mean": CENTRE,
    "nnm+meamed": CENTRE,
    "nnm+krum": CENTRE,
    "nnm+geometric_median": CENTRE,
    "krum(neighbors=4)": (0.5, 0.25),
    "krum(neighbors=3)": (0.5, 0.25),
    "geometric_median": (0.740456, 0.143991),
    "caf": (0.513304, 0.435236),
    "centered_clipping(radius=1,iterations=3)": (0.76938, 0.14028),
}

LINEAR = [
    "mean", "geometric_median", "krum", "multi_krum", "mda", "smea", "caf", "centered_clipping", "cge", "monna", "dnc",
    "ctma",
]  # fmt: skip
COORDINATE = ["median", "trimmed_mean", "meamed", "phocas", "bulyan"]
CHAINS = [
    "nnm+trimmed_mean", "nnm+median", "nnm+meamed", "nnm+geometric_median", "nnm+krum", "nnm+caf", "nnm+mean",
    "arc+nnm+trimmed_mean", "arc+multi_krum", "clipping+nnm+geometric_median", "clipping+mean", "arc+nnm+caf",
    "nnm+nnm+ctma", "nnm+bulyan",
]  # fmt: skip


@pytest.mark.parametrize("spec", APPENDIX_B)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_appendix_b_output(spec, dtype):
    out = make_rule(spec, 7, 2)(torch.tensor(X, dtype=dtype))
    np.testing.assert_allclose(out.numpy(), APPENDIX_B[spec], atol=1.5e-6)


def test_appendix_b_nnm_rows():
    rows = Nnm(7, 2)(np.array(X))
    np.testing.assert_allclose(rows[:5], [CENTRE] * 5, atol=1e-12)
    np.testing.assert_allclose(rows[5:], [(4.1, -3.55)] * 2, atol=1e-12)


def test_appendix_b_arc_clips_both_outliers_to_norm_root_two():
    norms = np.linalg.norm(Arc(7, 2)(np.array(X)), axis=1)
    np.testing.assert_allclose(norms[5:], 2**0.5, rtol=1e-12)
    np.testing.assert_allclose(norms[:5], np.linalg.norm(X[:5], axis=1), rtol=1e-12)


@pytest.mark.parametrize("spec", LINEAR + COORDINATE + CHAINS)
@pytest.mark.parametrize(("n", "f"), [(11, 2), (12, 2), (15, 3)])
def test_dense_definition_is_met(spec, n, f, dense):
    rng = np.random.default_rng(n)
    x = rng.standard_normal((n, 700)) + rng.standard_normal(700)
    x[:f] += 3.0 * rng.standard_normal((f, 700))
    want = dense.evaluate(spec, x, f)
    for dtype, tolerance in ((torch.float64, 1e-8), (torch.float32, 1e-5)):
        got = make_rule(spec, n, f)(torch.from_numpy(x).to(dtype)).double().numpy()
        assert np.abs(got - want).max() <= tolerance * np.abs(x).max(), dtype


@pytest.mark.parametrize("spec", ["median", "trimmed_mean", "meamed", "phocas"])
@pytest.mark.parametrize("n", [3, 8, 20, 33, 50, 101, 150])
def test_coordinate_rules_meet_their_definition_for_any_n(spec, n, dense):
    x = np.random.default_rng(n).standard_normal((n, 1000)).astype(np.float32)
    f = (n - 1) // 3
    want = dense.evaluate(spec, x.astype(np.float64), f)
    np.testing.assert_allclose(make_rule(spec, n, f)(x), want, atol=2e-6)


def test_every_rule_has_a_dense_definition_above():
    assert {s.split("(")[0] for s in LINEAR + COORDINATE} == set(RULES)


def test_centered_clipping_starts_at_the_reference(dense):
    rng = np.random.default_rng(0)
    x, reference = rng.standard_normal((9, 40)), rng.standard_normal(40)
    want = dense.centered_clipping(x, 2, radius=2.0, iterations=3, start=reference)
    rule = make_rule("centered_clipping(radius=2.0,iterations=3)", 9, 2)
    np.testing.assert_allclose(rule(x, reference=reference), want, rtol=1e-9)
    chained = make_rule("nnm+centered_clipping(radius=2.0)", 9, 2)
    want = dense.centered_clipping(dense.nnm(x, 2), 2, radius=2.0, start=reference)
    np.testing.assert_allclose(chained(x, reference=reference), want, rtol=1e-9)


def test_ctma_around_the_median(dense):
    x = np.random.default_rng(3).standard_normal((11, 300))
    np.testing.assert_allclose(
        make_rule("ctma(rule=median)", 11, 3)(x), dense.ctma(x, 3, inner=dense.median), atol=1e-12
    )


def test_bucketing_takes_means_of_buckets():
    x = np.random.default_rng(1).standard_normal((7, 5))
    out = Bucketing(7, 1, size=3)(x, rng=np.random.default_rng(5))
    order = np.random.default_rng(5).permutation(7)
    np.testing.assert_allclose(out, [x[order[:3]].mean(0), x[order[3:6]].mean(0), x[order[6:]].mean(0)], atol=1e-12)


def test_clipping_cuts_norms_and_leaves_short_rows(dense):
    x = np.random.default_rng(1).standard_normal((7, 5))
    np.testing.assert_allclose(Clipping(7, 1, radius=1.5)(x), dense.clipping(x, 1, 1.5), atol=1e-12)


def test_krum_on_models_with_a_common_offset_picks_the_right_row(dense):
    rng = np.random.default_rng(0)
    spread = 1e-3 * rng.standard_normal((30, 4000))
    x = (10.0 + spread).astype(np.float32)
    assert np.array_equal(make_rule("krum", 30, 6)(x), dense.krum(x.astype(np.float64), 6).astype(np.float32))


def test_offset_keeps_its_precision_when_faulty_rows_pull_the_mean_away():
    rng = np.random.default_rng(0)
    x = (10.0 + 1e-3 * rng.standard_normal((20, 4000))).astype(np.float32)
    x[:9] = 0.0
    gram = survey(torch.from_numpy(x)).gram
    got = gram[9, 9] + gram[10, 10] - 2 * gram[9, 10]
    want = ((x[9].astype(np.float64) - x[10]) ** 2).sum()
    assert abs(got - want) < 1e-5 * want
