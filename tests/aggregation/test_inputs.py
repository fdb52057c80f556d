"""Any input: types, memory that may not be written, rows that are not finite, magnitudes, ties, shards."""

from __future__ import annotations

import pickle
from itertools import pairwise

import numpy as np
import pytest
import torch

from raysys.aggregation import BLOCK, RULES, PerLayer, Survey, make_rule, survey

SPECS = [
    *sorted(RULES),
    "nnm+trimmed_mean", "arc+nnm+geometric_median", "bucketing+median", "clipping+mean", "arc+nnm+meamed",
    "nnm+bulyan", "arc+trimmed_mean", "clipping+centered_clipping", "centered_clipping(iterations=2)",
]  # fmt: skip
N, F = 12, 2


def stack(d=50, n=N, seed=0, dtype=torch.float32):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((n, d))).to(dtype)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_input_is_left_alone_and_type_is_kept(spec, dtype):
    x = stack(dtype=dtype)
    before = x.clone()
    out = make_rule(spec, N, F)(x)
    assert out.dtype == dtype
    assert out.shape == (50,)
    assert torch.equal(x, before)
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("spec", SPECS)
def test_read_only_memory_is_accepted(spec):
    x = stack().numpy()
    x.setflags(write=False)
    assert isinstance(make_rule(spec, N, F)(x), np.ndarray)


@pytest.mark.parametrize("spec", SPECS)
def test_lists_strides_and_arrays_give_the_same_numbers(spec):
    x = stack()
    rule = make_rule(spec, N, F)
    want = rule(x)
    assert torch.equal(rule(list(x)), want)
    assert np.array_equal(rule([row.numpy() for row in x]), want.numpy())
    wide = torch.zeros(N, 100)
    wide[:, ::2] = x
    assert torch.equal(rule(wide[:, ::2]), want)
    assert torch.equal(rule(x.T.contiguous().T), want)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("cut", [(1,), (2,), (1, 2), (3,)])
def test_sharded_is_the_whole_bit_for_bit(spec, cut):
    x, reference = stack(3 * BLOCK + 777), stack(3 * BLOCK + 777, n=1, seed=5)[0]
    x[3, 2 * BLOCK + 5] = float("nan")
    x[4] *= 1e20
    rule = make_rule(spec, N, F)
    whole = rule.plan(survey(x, reference, products=rule.least)).apply(x, reference)
    edges = [0, *(c * BLOCK for c in cut), x.shape[1]]
    parts = [(x[:, a:b].contiguous(), reference[a:b]) for a, b in pairwise(edges)]
    assert np.array_equal(rule(x, reference=reference).numpy(), whole.numpy())
    seen = [pickle.loads(pickle.dumps(survey(p, r, products=rule.least))) for p, r in parts]  # noqa: S301
    plan = pickle.loads(pickle.dumps(rule.plan(Survey.join(seen))))  # noqa: S301
    assert torch.equal(torch.cat([plan.apply(p, r) for p, r in parts]), whole)


@pytest.mark.parametrize("spec", SPECS)
def test_plan_applied_to_any_slices_is_the_whole_bit_for_bit(spec):
    x = stack(5000)
    rule = make_rule(spec, N, F)
    plan = rule.plan(survey(x))
    pieces = torch.cat([plan.apply(x[:, a:b]) for a, b in ((0, 1), (1, 3), (3, 1025), (1025, 1040), (1040, 5000))])
    assert torch.equal(pieces, plan.apply(x))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite_are_rejected_and_n_and_f_shrink(spec, bad):
    x = stack(seed=2)
    x[5, 7] = bad
    done = make_rule(spec, N, F).aggregate(x)
    assert done.rejected == (5,)
    rest = torch.cat([x[:5], x[6:]])
    rng = np.random.default_rng(0)
    want = make_rule(spec, N - 1, F - 1).aggregate(rest, rng=rng)
    torch.testing.assert_close(done.vector, want.vector, rtol=0, atol=0)
    if done.weights is not None:
        assert done.weights[5] == 0
        assert np.array_equal(np.delete(done.weights, 5), want.weights)


def test_more_rejected_rows_than_f_are_survived_with_f_zero():
    x = stack()
    x[:5] = float("nan")
    np.testing.assert_allclose(make_rule("trimmed_mean", N, F)(x), x[5:].mean(0), atol=1e-6)


def test_too_many_rejected_rows_are_an_error_that_names_the_numbers():
    x = stack(n=13)
    x[3:] = float("inf")
    with pytest.raises(ValueError, match=r"at least one finite row.*13 of 13"):
        make_rule("median", 13, 2)(torch.full_like(x, float("nan")))
    with pytest.raises(ValueError, match=r"monna trusts row 0"):
        make_rule("monna", 13, 2)(torch.cat([x[3:], x[:3]]))


@pytest.mark.parametrize(
    "spec",
    [
        *sorted(set(RULES) - {"mean", "cge", "centered_clipping"}),
        "nnm+median",
        "nnm+trimmed_mean",
        "nnm+caf",
        "arc+nnm+geometric_median",
    ],
)
@pytest.mark.parametrize("size", [1e4, 1e15, 1e30, -1e30, 3e38])
def test_outliers_of_any_size_stay_without_influence(spec, size):
    x = stack(300, n=15, seed=4)
    honest = x[3:].clone()
    x[12:], x[:12] = size, honest
    out = make_rule(spec, 15, 3)(x)
    assert torch.isfinite(out).all()
    spread = (honest - honest.mean(0)).norm(dim=1).mean()
    assert (out - honest.mean(0)).norm() < 2 * spread


@pytest.mark.parametrize("spec", SPECS)
def test_outliers_of_different_sizes_at_once(spec):
    x = stack(40, n=15)
    x[0], x[1], x[2] = 1e30, -1e20, 1e6
    out = make_rule(spec.replace("monna", "monna(index=9)"), 15, 3)(x)
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("exponent", [-100, -66, 100])
def test_a_whole_stack_may_be_tiny_or_huge(spec, exponent):
    if spec.startswith("clipping"):  # its radius is absolute
        return
    x = stack(64)
    rule = make_rule(spec, N, F)
    torch.testing.assert_close(
        torch.ldexp(rule(torch.ldexp(x, torch.tensor(exponent))), torch.tensor(-exponent)),
        rule(x),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("spec", SPECS)
def test_all_rows_equal_or_zero_or_one_column(spec):
    rule = make_rule(spec, N, F)
    row = stack(20)[0]
    if not spec.startswith(("clipping", "centered_clipping")):
        assert torch.equal(rule(row.repeat(N, 1)), row)
    assert torch.equal(rule(torch.zeros(N, 8)), torch.zeros(8))
    assert rule(torch.zeros(N, 1)).shape == (1,)


@pytest.mark.parametrize("spec", [s for s in SPECS if "bulyan" not in s and "bucketing" not in s])
@pytest.mark.parametrize("f", [1, 3])
def test_n_of_2f_plus_1_works(spec, f):
    out = make_rule(spec, 2 * f + 1, f)(stack(n=2 * f + 1))
    assert torch.isfinite(out).all()


def test_rows_beyond_the_range_of_squares_count_as_not_finite():
    x = stack(dtype=torch.float64)
    x[3] = 1e200
    assert make_rule("krum", N, F).aggregate(x).rejected == (3,)


def test_two_calls_give_the_same_bits():
    x = stack(20_000)
    for spec in SPECS:
        rule = make_rule(spec, N, F)
        assert torch.equal(rule(x), rule(x))


def test_bucketing_follows_its_rng():
    x = stack()
    rule = make_rule("bucketing+median", N, F)
    a, b, c = (rule(x, rng=np.random.default_rng(s)) for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_per_layer_is_the_rule_on_each_slice():
    x = stack(90)
    rule = make_rule("krum", N, F)
    out = PerLayer(rule, [40, 50])(x)
    assert torch.equal(out, torch.cat([rule(x[:, :40]), rule(x[:, 40:])]))
    with pytest.raises(ValueError, match=r"add up to 80.*d=90"):
        PerLayer(rule, [40, 40])(x)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(5), r"shape \(n, d\)"),
        (torch.zeros(3, 4, dtype=torch.int64), "int64"),
        ([], "empty list"),
    ],
)
def test_what_is_not_a_stack_is_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        make_rule("median", 3, 1)(bad)
