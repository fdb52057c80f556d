"""The exact facts of specs/tad_lora.md, section 5.4, by number. Those of graphs alone (1, 2, 12) are in tests/graph."""

import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raysys.graph import GRAPHS, Graph, Process, complete, make_process
from raysys.nn.body import TextBody, pool, random_head
from raysys.nn.lora import find_layout, load_factors, peft_model
from raysys.nn.pretrained import load_base
from raysys.runtime.seeds import Stream
from raysys.systems.tad_lora import combine, regression
from raysys.systems.tad_lora.policies import METHODS, alternating
from raysys.systems.tad_lora.simulate import Simulation
from raysys.systems.tad_lora.task import Task
from tests.systems.tad_lora.conftest import factors


def drawn(n, r=3, d_in=7, d_out=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(n, r, d_in, generator=g, dtype=torch.float64),
        torch.randn(n, d_out, r, generator=g, dtype=torch.float64),
    )


# 2 (factors): mixing moves no mean.
@pytest.mark.parametrize(
    "topology", ["erdos_renyi(p=0.2)", "ring", "matching", "finite_time(k=2)", "waypoint(radius=0.4, speed=0.1)"]
)
def test_mixing_leaves_the_means_of_a_and_b(simulate, topology):
    s = simulate(topology=topology, rounds=1)
    block = s.blocks[0]
    for t in range(1, 6):
        sent = [b.train(t) for b in s.blocks]
        before = [x.astype(np.float64).mean(0) for x in factors(s)]
        for b in s.blocks:
            b.exchange(t, np.concatenate([i for i, _ in sent]), np.concatenate([r for _, r in sent]), {})
        for x, y in zip(before, factors(s), strict=True):
            assert np.abs(x - y.astype(np.float64).mean(0)).max() < 1e-6
    assert block.process.mixing(3, block.seeds.rng(Stream.GRAPH, 0, 3)).shape == (10, 10)


# 3: the cross term.
@settings(max_examples=30, deadline=None)
@given(st.integers(1, 7), st.integers(0, 10**6))
def test_the_cross_term_is_the_mean_product_of_deviations(n, seed):
    a, b = drawn(n, seed=seed)
    direct = (b @ a).mean(0) - b.mean(0) @ a.mean(0)
    deviations = ((b - b.mean(0)) @ (a - a.mean(0))).mean(0)
    assert (direct - deviations).abs().max() < 1e-10
    squared, product = combine.cross_term(a, b)
    assert squared == pytest.approx(float(direct.square().sum()), rel=1e-9, abs=1e-20)
    assert product == pytest.approx(float((b.mean(0) @ a.mean(0)).square().sum()), rel=1e-9)
    d_a, d_b = ((x - x.mean(0)).square().sum((1, 2)).mean() for x in (a, b))
    assert squared**0.5 <= float((d_a * d_b).sqrt()) + 1e-12


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 7), st.integers(0, 10**6))
def test_a_peers_own_cross_term_is_the_weighted_product_of_deviations(n, seed):
    a, b = drawn(n, seed=seed)
    w = torch.from_numpy(np.random.default_rng(seed).dirichlet(np.ones(n)))
    a_mix, b_mix = torch.tensordot(w, a, 1), torch.tensordot(w, b, 1)
    deviations = (w[:, None, None] * ((b - b_mix) @ (a - a_mix))).sum(0)
    assert (combine.local_cross_term(a, b, w) - deviations).abs().max() < 1e-10


@pytest.mark.parametrize("same", ["a", "b"])
def test_the_cross_term_is_zero_where_one_factor_is_common(same):
    a, b = drawn(6)
    a, b = (a[:1].expand_as(a), b) if same == "a" else (a, b[:1].expand_as(b))
    assert combine.cross_term(a, b)[0] < 1e-40  # the mean of equal numbers is equal up to rounding


# 4
@pytest.mark.parametrize("problem", ["regression", "text"])
def test_tad_that_never_switches_is_ffa_bit_for_bit(simulate, problem):
    forever, frozen = simulate(problem=problem, method="tad", interval=100), simulate(problem=problem, method="ffa")
    for x, y in zip(factors(forever), factors(frozen), strict=True):
        assert np.array_equal(x, y)


# 5
def test_tad_with_interval_one_is_adf_with_interval_one(simulate):
    tad, adf = simulate(method="tad", interval=1), simulate(method="adf", interval=1)
    assert all(np.array_equal(x, y) for x, y in zip(factors(tad), factors(adf), strict=True))


def test_on_the_complete_graph_tad_with_interval_one_is_rolora(simulate):
    tad, rolora = (
        simulate(method="tad", interval=1, topology="complete"),
        simulate(method="rolora", topology="complete"),
    )
    for x, y in zip(factors(tad), factors(rolora), strict=True):
        assert np.abs(x - y).max() < 1e-6
        assert np.abs(x - x[0]).max() < 1e-6  # all equal after each round up to the last bit: no cross term
    assert tad.evaluate(tad.task.rounds - 1)["cross_term"] < 1e-12


# 6
def test_one_peer_is_local_alternation(simulate):
    s = simulate(method="tad", interval=2, peers=1, block=1)
    seeds, setting = s.task.seeds, s.task.setting
    (a, b), target = s.task.start(-1), regression.targets(1, setting.heterogeneity, seeds)
    a, b = regression.LAYOUT.split_a(a[None])[0], regression.LAYOUT.split_b(b[None])[0]
    for t in range(setting.rounds):
        noise = regression.noises(seeds, np.arange(1), t, setting.steps, setting.noise)
        learn_b = float((t // 2) % 2 == 0)
        for k in range(setting.steps):
            error = b @ a - target + noise[:, k]
            step_a, step_b = b.transpose(1, 2) @ error, error @ a.transpose(1, 2)
            a, b = a - setting.lr * (1 - learn_b) * step_a, b - setting.lr * learn_b * step_b
    assert np.abs(s.blocks[0].a[0] - a.flatten().numpy()).max() < 1e-6
    assert np.abs(s.blocks[0].b[0] - b.flatten().numpy()).max() < 1e-6


def test_one_sgd_step_on_the_complete_graph_is_centralised_block_descent_on_the_mean_gradient(simulate):
    s = simulate(method="tad", interval=1, topology="complete", steps=1, noise=0.0, rounds=6)
    target = regression.targets(10, s.task.setting.heterogeneity, s.task.seeds).mean(0)
    a0, b0 = s.task.start(-1)
    a, b = regression.LAYOUT.split_a(a0)[0], regression.LAYOUT.split_b(b0)[0]
    for t in range(6):
        error = b @ a - target
        if t % 2 == 0:
            b = b - s.task.setting.lr * error @ a.T
        else:
            a = a - s.task.setting.lr * b.T @ error
    assert np.abs(s.blocks[0].a[3] - a.flatten().numpy()).max() < 1e-5
    assert np.abs(s.blocks[0].b[3] - b.flatten().numpy()).max() < 1e-5


# 7
def test_the_frozen_factor_contracts_by_each_realised_matrix_and_by_rho_on_average(simulate):
    s = simulate(method="tad", interval=1000, lr=1e-12, rounds=1)  # nothing learns: what moves is mixing
    rng, n, ratios = np.random.default_rng(0), 10, []
    process = make_process("erdos_renyi(p=0.3)", n, "metropolis_hastings", rng)
    for t in range(1, 400):
        start = rng.normal(size=(n, s.blocks[0].a.shape[1])).astype(np.float32)
        for k, block in enumerate(s.blocks):
            block.a = start[5 * k : 5 * k + 5].copy()
        sent = [b.train(t) for b in s.blocks]
        for b in s.blocks:
            b.exchange(t, np.concatenate([i for i, _ in sent]), np.concatenate([r for _, r in sent]), {})
        spread = [np.square(x - x.mean(0)).sum() for x in (start.astype(np.float64), factors(s)[0].astype(np.float64))]
        w = process.mixing(t, s.task.seeds.rng(Stream.GRAPH, 0, t))
        worst = np.linalg.norm(w - 1 / n, 2) ** 2
        assert spread[1] / spread[0] <= worst + 1e-6
        ratios.append(spread[1] / spread[0])
    assert np.mean(ratios) == pytest.approx(s.task.rho, abs=0.02)


# 8
def test_with_a_vanishing_step_nothing_moves_and_the_model_is_the_base_model():
    base = load_base()
    layout = find_layout(base.model, (), 2, 8, 16)
    body = TextBody(base, layout, 32)
    a, b = layout.init(torch.Generator().manual_seed(0))
    made = body.tokens(["the pilot asked the nurse", "a short one"])
    with torch.no_grad():
        plain = pool(base.model(**made).last_hidden_state, made["attention_mask"], base.causal)
        adapted = body.pooled_tokens(made, a[None], b[None])
    assert torch.equal(plain, adapted)


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"centralised", "flora", "fedex", "decaf", "procrustes"}))
def test_with_step_size_zero_factors_stay_at_their_start(method, simulate):
    s = simulate(method=method, lr=1e-30, interval=1)
    a, _b = s.task.start(-1)
    found_a, found_b = factors(s)
    assert np.array_equal(found_a, np.broadcast_to(a.numpy(), found_a.shape))
    assert np.abs(found_b).max() < 1e-25


# 9
def test_the_gradient_of_a_is_exactly_zero_where_b_is_zero(simulate):
    s = simulate(problem="text", rounds=1)
    learner, (a, b) = s.task.learner, s.task.start(-1)
    rows = learner.batch(np.arange(2), 0, 0)
    leaf = a.repeat(2, 1).requires_grad_(True)
    zero = b.repeat(2, 1).requires_grad_(True)
    out = learner.body.pooled(learner.store.of(rows), rows, leaf, zero) @ learner.head.T
    grad_a, grad_b = torch.autograd.grad(out.square().sum(), [leaf, zero])
    assert not grad_a.any()
    assert grad_b.any()


# 10
def test_a_gauge_leaves_the_product_and_product_mixing_but_not_factor_mixing():
    a, b = drawn(4)
    turn = torch.linalg.qr(torch.randn(4, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    a2, b2 = turn.transpose(1, 2) @ a, b @ turn
    w = torch.full((4,), 0.25, dtype=torch.float64)
    assert (b @ a - b2 @ a2).abs().max() < 1e-12
    factor = [torch.tensordot(w, y, 1) @ torch.tensordot(w, x, 1) for x, y in ((a, b), (a2, b2))]
    assert (factor[0] - factor[1]).abs().max() > 0.1  # by design: averaging factors depends on the gauge
    product = [y @ x for x, y in (combine.low_rank(*combine.stacked(x, y, w), 3) for x, y in ((a, b), (a2, b2)))]
    assert (product[0] - product[1]).abs().max() < 1e-10
    aligned = combine.rotated(a2, b2, a[0])
    assert (aligned[1] @ aligned[0] - b @ a).abs().max() < 1e-12


def test_alignment_undoes_a_rotation_exactly():
    a, b = drawn(1)
    turn = torch.linalg.qr(torch.randn(3, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    found_a, found_b = combine.rotated(turn.transpose(1, 2) @ a, b @ turn, a[0])
    assert (found_a - a).abs().max() < 1e-10
    assert (found_b - b).abs().max() < 1e-10


# 11
@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(0, 10**6))
def test_stacking_is_exact_and_truncation_attains_the_eckart_young_error(n, seed):
    a, b = drawn(n, seed=seed)
    w = torch.from_numpy(np.random.default_rng(seed).dirichlet(np.ones(n)))
    exact = (w[:, None, None] * (b @ a)).sum(0)
    b_cat, a_cat = combine.stacked(a, b, w)
    assert (b_cat @ a_cat - exact).abs().max() < 1e-10
    low_a, low_b = combine.low_rank(b_cat, a_cat, 3)
    left_out = torch.linalg.svdvals(exact)[3:].square().sum().sqrt()
    assert float((low_b @ low_a - exact).norm()) == pytest.approx(float(left_out), abs=1e-9)
    assert torch.allclose(low_a @ low_a.T, low_b.T @ low_b, atol=1e-9)  # balanced


@pytest.mark.parametrize("method", ["flora", "fedex"])
def test_a_method_that_changes_the_base_holds_the_mean_product_exactly(simulate, method):
    s = simulate(method=method, topology="complete", rounds=1)
    twin = simulate(method="local", topology="complete", rounds=1)  # the same local steps, not yet combined
    a, b = (torch.from_numpy(x).double() for x in factors(twin))
    exact = (regression.LAYOUT.split_b(b)[0] @ regression.LAYOUT.split_a(a)[0]).mean(0)
    for block in s.blocks:
        a_i, b_i = torch.from_numpy(block.a[:1]), torch.from_numpy(block.b[:1])
        held = (regression.LAYOUT.split_b(b_i)[0] @ regression.LAYOUT.split_a(a_i)[0])[0] + block.shift[0]
        assert (held - exact).abs().max() < 1e-5


# 13
@pytest.mark.parametrize(
    ("method", "factors_sent"), [("lora", 2), ("tad", 2), ("ffa", 1), ("rolora", 1), ("fedsa", 1), ("local", 0)]
)
def test_bytes_are_two_messages_per_active_edge_of_what_is_mixed(simulate, method, factors_sent):
    s = simulate(method=method)
    process, seeds = s.task.process, s.task.seeds
    edges = sum(
        int((process.mixing(t, seeds.rng(Stream.GRAPH, 0, t)) > 0).sum() - 10) for t in range(s.task.setting.rounds)
    )
    assert s.bytes == edges * factors_sent * regression.LAYOUT.size_a * 4  # A and B are equally long here
    assert s.messages == (edges if factors_sent else 0)


# 14 (actors: tests/actors/test_tad_lora.py)
def test_grouped_peers_equal_one_peft_model_each(simulate):
    values = {"problem": "text", "method": "tad", "interval": 1, "optimizer": "sgd", "lr": 0.05, "rounds": 4}
    grouped, single = simulate(**values), simulate(**values, backend="peft")
    for x, y in zip(factors(grouped), factors(single), strict=True):
        assert np.abs(x - y).max() < 1e-6
    assert np.abs(factors(grouped)[1]).max() > 1e-3  # something was learned
    assert np.array_equal(grouped.right(), single.right())


def test_adams_moments_are_kept_alike_by_both_backends(simulate):
    values = {"problem": "text", "method": "lora", "optimizer_state": "kept", "lr": 1e-3, "rounds": 2}
    grouped, single = simulate(**values), simulate(**values, backend="peft")
    assert set(grouped.blocks[0].moments) == {f"{x}.{y}" for x in "AB" for y in ("exp_avg", "exp_avg_sq", "step")}
    for key, value in grouped.blocks[1].moments.items():
        assert np.abs(value - single.blocks[1].moments[key]).max() < 1e-5, key
    assert (grouped.blocks[0].moments["A.step"] == 4).all()


@pytest.mark.parametrize("method", ["tad", "decaf", "flora", "fedex"])
def test_blocks_of_any_size_give_the_same_run(simulate, method):
    values = {"method": method, "topology": "complete", "interval": 2}
    whole = simulate(block=5, **values)
    for block in (1, 3, 10):
        parts = simulate(block=block, **values)
        for x, y in zip(factors(parts), factors(whole), strict=True):
            assert np.abs(x - y).max() < 1e-6
        assert parts.evaluate(11)["error"] == pytest.approx(whole.evaluate(11)["error"], rel=1e-4)


def test_a_peer_that_is_not_finite_leaves_the_others_frozen_weights_alike(simulate):
    s = simulate(method="fedex", topology="complete", rounds=1, block=1)
    s.blocks[4].a[:] = np.nan
    s.step(1)
    assert all(torch.equal(block.shift[0], s.blocks[0].shift[0]) for block in s.blocks)


# push-sum
def test_on_a_directed_graph_with_absences_mass_and_weighted_sums_are_kept(simulate):
    s = simulate(method="lora", topology="one_peer_exponential", absence=0.4, lr=1e-30, rounds=1)
    rng = np.random.default_rng(0)
    for block in s.blocks:
        block.a += rng.normal(size=block.a.shape).astype(np.float32)
    mass = [np.concatenate([b.mass for b in s.blocks])]
    total = [(mass[0][:, None] * factors(s)[0]).sum(0)]
    for t in range(1, 30):
        s.step(t)
        mass.append(np.concatenate([b.mass for b in s.blocks]))
        total.append((mass[-1][:, None] * factors(s)[0].astype(np.float64)).sum(0))
    assert abs(mass[-1].sum() - 10) < 1e-9
    assert np.abs(total[-1] - total[0]).max() < 1e-4
    assert np.abs(mass[-1] - 1).max() > 0.05  # masses do differ here


def test_training_sees_the_same_graphs_and_absences_with_and_without_a_probe(simulate):
    values = {"method": "tad", "absence": 0.3, "topology": "erdos_renyi(p=0.3)"}
    probed = simulate(**values, interval_from="probe", probe_rounds=40)
    told = simulate(**values, interval=probed.interval)
    assert all(np.array_equal(x, y) for x, y in zip(factors(probed), factors(told), strict=True))


# 15
@pytest.mark.parametrize("method", ["tad", "lora", "decaf", "procrustes"])
def test_renaming_peers_renames_the_result(simulate, monkeypatch, method):
    order = np.random.default_rng(0).permutation(10)
    plain = Process.mixing
    values = {"method": method, "interval": 2, "noise": 0.0, "block": 10}
    calm = factors(simulate(**values))
    original = regression.targets
    monkeypatch.setattr(regression, "targets", lambda *args: original(*args)[order])

    def renamed(self, *args):
        return plain(self, *args)[np.ix_(order, order)]

    monkeypatch.setattr(Process, "mixing", renamed)
    for x, y in zip(calm, factors(simulate(**values)), strict=True):
        assert np.abs(x[order] - y).max() < 1e-5
        assert np.abs(x[order] - x).max() > 1e-3


@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e6])
@pytest.mark.parametrize("method", ["tad", "lora", "rolora", "decaf", "procrustes"])
def test_nothing_passes_between_two_components(simulate, monkeypatch, poison, method):
    halves = Graph(np.kron(np.eye(2, dtype=bool), complete(5).adjacency))  # peers 0..4 and 5..9 never meet
    monkeypatch.setitem(
        GRAPHS, "ring", lambda n, rng: halves
    )  # the process draws it and weighs it as it does any other

    def run(hurt):
        s = simulate(method=method, interval=1, rounds=1, topology="ring")
        if hurt:
            s.blocks[0].a[2] = poison
        for t in range(1, 5):
            s.step(t)
        return s

    calm, hurt = run(False), run(True)
    for x, y in ((calm.blocks[1].a, hurt.blocks[1].a), (calm.blocks[1].b, hurt.blocks[1].b)):
        assert np.array_equal(x, y)
    if not np.isfinite(poison):  # nor does it reach the peers of its own component
        others = [0, 1, 3, 4]
        assert np.isfinite(hurt.blocks[0].a[others]).all()
        assert np.isfinite(hurt.blocks[0].b[others]).all()
        assert hurt.blocks[1].refused == 4
    else:
        assert not np.array_equal(calm.blocks[0].a, hurt.blocks[0].a)


# 16
@settings(max_examples=50, deadline=None)
@given(st.integers(1, 12), st.integers(1, 100))
def test_phases_are_t_rounds_of_b_then_t_of_a_with_so_many_switches(interval, rounds):
    phases = [alternating(interval)(t) for t in range(rounds)]
    assert phases[:interval] == ["B"] * min(interval, rounds)
    assert phases[interval : 2 * interval] == ["A"] * max(0, min(interval, rounds - interval))
    assert sum(x != y for x, y in itertools.pairwise(phases)) == -(-rounds // interval) - 1


def test_the_head_and_the_start_are_the_same_for_all_methods_of_a_seed(simulate):
    one, other = simulate(problem="text", method="tad", rounds=1), simulate(problem="text", method="lora", rounds=1)
    assert torch.equal(one.task.head, other.task.head)
    assert all(torch.equal(x, y) for x, y in zip(one.task.start(-1), other.task.start(-1), strict=True))
    assert not torch.equal(one.task.head, Task(one.task.setting, 99).head)


def test_a_grouped_forward_pass_equals_peft_bit_for_bit():
    base = load_base()
    layout = find_layout(base.model, (), 0, 8, 16)
    body, g = TextBody(base, layout, 32), torch.Generator().manual_seed(0)
    head = random_head(5, base.width, g)
    a, b = torch.randn(3, layout.size_a, generator=g) * 0.05, torch.randn(3, layout.size_b, generator=g) * 0.05
    made = body.tokens(["one two three", "where is the red car now"] * 3)
    single = peft_model(copy.deepcopy(base.model), layout)
    with torch.no_grad():
        together = body.pooled_tokens(made, a, b) @ head.T
        for k in range(3):
            load_factors(single, layout, a[k], b[k])
            part = {key: value[2 * k : 2 * k + 2] for key, value in made.items()}
            alone = pool(single(**part).last_hidden_state, part["attention_mask"], False) @ head.T
            assert (together[2 * k : 2 * k + 2] - alone).abs().max() < 1e-6


def test_a_simulation_measures_what_it_says(simulate):
    s: Simulation = simulate(method="lora")
    found = s.evaluate(s.task.rounds - 1)
    a, b = (torch.from_numpy(x).double() for x in factors(s))
    a, b = regression.LAYOUT.split_a(a)[0], regression.LAYOUT.split_b(b)[0]
    assert found["cross_term"] == pytest.approx(float(((b @ a).mean(0) - b.mean(0) @ a.mean(0)).norm()), rel=1e-6)
    assert found["disagreement_a"] == pytest.approx(float((a - a.mean(0)).square().sum((1, 2)).mean()), rel=1e-6)
    target = regression.targets(10, 0.5, s.task.seeds).mean(0).double()
    error = (b @ a - target).square().sum((1, 2)) / target.square().sum()
    assert found["error"] == pytest.approx(float(error.mean()), rel=1e-4)
    assert found["worst_error"] == pytest.approx(float(error.max()), rel=1e-4)
    matrices = [s.task.process.mixing(t, s.task.seeds.rng(Stream.GRAPH, 0, t)) for t in range(s.task.rounds)]
    mean = np.mean([w.T @ w for w in matrices], 0) - 0.1
    assert found["rho"] == pytest.approx(np.linalg.eigvalsh(mean)[-1], abs=1e-9)
