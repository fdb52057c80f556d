"""Exact checks of elastic training: views equal cut-out models, rows with sub-models of their own, the sampler's frequencies."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import chisquare
from streams_for_tests import SIZES, SMALL, packed, samples, small_model

from raysys.runtime.seeds import Seeds, Stream
from raysys.systems.ernie.cut import cost, cut
from raysys.systems.ernie.elastic import Elastic, SubModel, by_usage, sample
from raysys.systems.ernie.setting import ElasticSetting

SUBS = {
    "depth": SubModel((0, 2, 3, 4), 3),
    "sparsity": SubModel((0, 1, 2, 3, 4), 1),
    "width": SubModel((0, 1, 2, 3, 4), 3, ((0, 2, 3, 7),) * 3 + ((1, 4, 5, 6),) * 2),
    "all": SubModel((0, 2, 3, 4), 2, ((0, 2, 3, 7),) * 2 + ((1, 4, 5, 6),) * 2),
}


def same(a, b, tolerance=0.0):
    for name in ("text", "bits"):
        assert torch.allclose(getattr(a, name), getattr(b, name), rtol=0, atol=tolerance), name
    for one, other in zip(a.codes, b.codes, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=tolerance)


def test_the_full_view_is_the_plain_model_bit_for_bit():
    model, batch = small_model(), packed(samples(), 192)
    with torch.no_grad():
        same(model(batch), model(batch, SubModel.full(SMALL).rows(batch.rows, SMALL)))


def test_all_experts_allowed_is_the_plain_model_bit_for_bit():
    model, batch = small_model(), packed(samples(), 192)
    r = batch.rows
    every = Elastic(torch.ones(r, 5, dtype=torch.bool), torch.full((r,), 3), torch.ones(5, r, 8, dtype=torch.bool))
    with torch.no_grad():
        same(model(batch), model(batch, every))


@pytest.mark.parametrize("name", SUBS)
def test_a_view_equals_the_model_cut_out(name):
    """Depth: exactly (a layer passed over is a layer removed). Others: largest difference seen 1e-6."""
    model, batch, sub = small_model(), packed(samples(), 192), SUBS[name]
    own = cut(model, sub)
    with torch.no_grad():
        same(model(batch, sub.rows(batch.rows, SMALL)), own(batch), 0.0 if name == "depth" else 1e-5)


@pytest.mark.parametrize("name", SUBS)
def test_accounting_equals_the_parameters_of_the_model_cut_out(name):
    model, sub = small_model(), SUBS[name]
    own = cut(model, sub)
    found = cost(model, sub, 10)
    assert found.total == sum(p.numel() for p in own.parameters())
    e = sum(p.numel() for n, p in own.named_parameters() if "moe.w_" in n)
    assert found.active == found.total - e + e * sub.active // own.setting.experts


@pytest.mark.parametrize("balance", ["none", "aux"])
def test_a_bias_that_is_not_trained_is_no_parameter(balance):
    model = small_model(SMALL.with_values({"balance": balance}))
    own = cut(model, SUBS["all"])
    assert cost(model, SUBS["all"], 10).total == sum(p.numel() for p in own.parameters())


def test_rows_with_sub_models_of_their_own_equal_each_by_itself():
    model, given = small_model(), samples()
    batch = packed(given)
    subs = [SUBS[name] for name in ("depth", "sparsity", "width", "all", "depth", "width", "sparsity")]
    each = [sub.rows(1, SMALL) for sub in subs]
    one = torch.ones(5, 1, 8, dtype=torch.bool)
    together = Elastic(
        torch.cat([e.keep for e in each]),
        torch.cat([e.active for e in each]),
        torch.cat([one if e.allowed is None else e.allowed for e in each], 1),
    )
    with torch.no_grad():
        out = model(batch, together)
        alone = [model(packed([s]), e) for s, e in zip(given, each, strict=True)]
    assert torch.allclose(out.text, torch.cat([a.text for a in alone]), atol=1e-5)
    assert torch.allclose(out.bits, torch.cat([alone[1].bits, alone[3].bits]), atol=1e-5)


def test_skipped_rows_cost_nothing():
    model, batch = small_model(), packed(samples())
    elastic = SubModel.full(SMALL).rows(batch.rows, SMALL)
    elastic.keep[2:, 1] = False
    out = model(batch, elastic)
    routed = [len(places) for places, _ in out.routed]
    assert routed[0] == int(batch.valid.sum())
    assert routed[1] == int(batch.valid[:2].sum())


def test_only_unrestricted_rows_count_for_the_balance():
    model, batch = small_model(), packed(samples())
    elastic = SubModel.full(SMALL).rows(batch.rows, SMALL)
    elastic.active[0] = 1
    assert elastic.counted(3).tolist() == [False] + [True] * 6
    _, told = model(batch, elastic).routed[0]
    assert int(told.counted.sum()) == int(batch.valid[1:].sum())


def test_the_sampler_has_the_papers_frequencies():
    """P(whole) = .75 * .8 * .8 = .48; a chi-square test over the eight kinds of rows."""
    n = 20_000
    setting = SMALL.with_values({"layers": 8})
    e = sample(n, setting, 3, ElasticSetting(), Seeds(0).generator(Stream.PARTICIPATION))
    assert e is not None
    assert e.keep[:, 0].all()
    assert e.keep[:, -3:].all()
    depth, width, fewer = ~e.keep.all(1), ~e.allowed[0].all(1), e.active < 3
    seen = torch.bincount(depth * 4 + width * 2 + fewer * 1, minlength=8).numpy()
    p = [(0.25 if i & 4 else 0.75) * (0.2 if i & 2 else 0.8) * (0.2 if i & 1 else 0.8) for i in range(8)]
    assert chisquare(seen, [n * one for one in p]).pvalue > 0.001
    assert abs(seen[0] / n - 0.48) < 0.015
    assert e.allowed[0][width].sum(1).unique().tolist() == [4]
    assert sorted(e.active[fewer].unique().tolist()) == [1, 2]
    dropped = (~e.keep[depth]).sum(1)
    assert sorted(dropped.unique().tolist()) == [1, 2, 3, 4]


def test_no_elasticity_is_no_sampling():
    off = ElasticSetting(depth=0, width=0, sparsity=0)
    assert sample(4, SMALL, 3, off, torch.Generator()) is None


def test_the_most_used_experts_are_kept():
    counts = torch.tensor([[1, 9, 3, 3], [5, 5, 5, 5]])
    assert by_usage(counts, 0.5, [0, 1]) == ((1, 2), (0, 1))


@pytest.mark.parametrize(
    ("sub", "words"),
    [
        (SubModel((1, 2, 3, 4), 3), "layers"),
        (SubModel((0, 1, 2, 3), 3), "layers"),
        (SubModel((0, 2, 1, 3, 4), 3), "layers"),
        (SubModel((0, 2, 3, 4), 4), "active"),
        (SubModel((0, 2, 3, 4), 3, ((0, 1),) * 4), "active"),
        (SubModel((0, 2, 3, 4), 1, ((0, 8),) * 4), "experts"),
    ],
)
def test_what_is_no_sub_model_is_refused(sub, words):
    with pytest.raises(ValueError, match=words):
        sub.check(SMALL, SIZES.levels)
