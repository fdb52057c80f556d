import math
from collections import defaultdict

import numpy as np
import pytest

from raysys.aggregation import make_rule
from raysys.aggregation.neighbours import make_peer_rule
from raysys.attacks import make_attack
from raysys.graph import two_cliques
from raysys.systems.byzantine import figures, theory
from raysys.systems.byzantine.floors import (
    aggregate_columns,
    floors_table,
    misspecified_table,
    momentum_table,
    noise_table,
    world_floors,
)
from raysys.systems.byzantine.gossip import complete_table, contraction, gossip_table, split_start
from raysys.systems.byzantine.lower_bound import lower_bound_instance
from raysys.systems.byzantine.theory_claims import theory_claims


@pytest.fixture(scope="module")
def floors():
    return floors_table(rules=("trimmed_mean",))


@pytest.fixture(scope="module")
def momentum():
    return momentum_table(rules=("trimmed_mean",), rounds=1500)


@pytest.fixture(scope="module")
def gossip():
    return gossip_table(bs=(1, 2, 3), rounds=60)


def test_measured_floors_equal_the_exact_instance_up_to_breakdown(floors):
    below = [r for r in floors if math.isfinite(r["lower_bound"])]
    assert {r["B"] for r in below} == {0.0, 0.5, 1.0, 1.5}
    for B in (0.0, 0.5, 1.0, 1.5):
        assert max(r["f"] for r in below if r["B"] == B) == math.ceil(20 * theory.breakdown(B)) - 1
    for row in below:
        assert row["measured"] == pytest.approx(row["lower_bound"], rel=0.01)
        assert row["upper_bound"] == pytest.approx(row["lower_bound"])


def test_floors_explode_at_and_beyond_breakdown(floors):
    beyond = defaultdict(dict)
    for row in floors:
        if math.isinf(row["lower_bound"]):
            assert row["f_over_n"] >= row["breakdown"] - 1e-12
            beyond[row["B"], row["f"]][row["z"]] = row["measured"]
    assert beyond
    for values in beyond.values():
        assert values[100.0] > 9000 * values[1.0]


@pytest.mark.parametrize(
    ("spec", "n", "f", "G", "B"),
    [
        ("median", 20, 4, 1.0, 1.0),
        ("median", 11, 2, 2.0, 1.5),
        ("geometric_median", 20, 4, 1.0, 1.0),
        ("caf", 20, 4, 1.0, 1.0),
    ],
)
def test_symmetric_rules_reach_the_same_floor(spec, n, f, G, B):
    instance = lower_bound_instance(n, f, G, B)
    worlds = world_floors(make_rule(spec, n, f), instance, np.random.default_rng(0), rounds=200)
    assert worlds.mean() == pytest.approx(instance.floor, rel=0.01)


def not_below(worlds, floor):
    assert worlds.mean() >= floor * 0.9, worlds / floor  # which of tied rows is taken is drawn every round


def worlds_of(spec, shuffle):
    instance = lower_bound_instance(20, 6, 1.0, 0.0)
    rng = np.random.default_rng(1)
    return instance.floor, world_floors(
        make_rule(spec, 20, 6), instance, rng, rounds=200, gamma=0.1, shuffle=shuffle, start=0.0
    )


@pytest.mark.parametrize(
    "spec",
    ["trimmed_mean", "median", "meamed", "phocas", "krum", "multi_krum", "geometric_median", "mda", "nnm+trimmed_mean"],
)
def test_no_rule_beats_the_lower_bound_averaged_over_both_worlds_each_run_on_its_own(spec):
    floor, worlds = worlds_of(spec, shuffle=True)
    not_below(worlds, floor)


@pytest.mark.parametrize("spec", ["multi_krum", "mda", "nnm+trimmed_mean"])
def test_honest_first_order_lets_ties_betray_who_is_honest(spec):
    floor, worlds = worlds_of(spec, shuffle=False)
    assert worlds.max() < 0.3 * floor  # impossible for an algorithm that does not know
    with pytest.raises(AssertionError):
        not_below(worlds, floor)


@pytest.mark.parametrize("spec", ["trimmed_mean", "median", "geometric_median"])
def test_measured_noise_floors_equal_the_exact_instance(spec):
    for row in noise_table(rules=(spec,), rounds=200):
        assert row["measured"] == pytest.approx(row["floor"], rel=0.01)


def test_local_momentum_lies_under_its_bound_and_falls_with_alpha(momentum):
    noise = sorted((r for r in momentum if r["part"] == "noise"), key=lambda r: r["alpha"])
    values = [r["measured"] for r in noise]
    assert values == sorted(values)
    for row in noise:
        assert row["measured"] <= row["bound"] * (1.01 if row["alpha"] == 1.0 else 1.0)
        if row["alpha"] < 1.0:
            assert row["measured"] == pytest.approx(
                {0.5: 0.1883, 0.2: 0.0538, 0.1: 0.0250, 0.05: 0.0120}[row["alpha"]], rel=0.08
            )  # T3 of the specification


def test_local_momentum_leaves_the_heterogeneity_floor_alone(momentum):
    rows = [r for r in momentum if r["part"] == "heterogeneity"]
    assert len(rows) == 5
    for row in rows:
        assert row["measured"] == pytest.approx(row["bound"], rel=0.01)


def test_nnm_before_trimmed_mean_stays_under_the_momentum_bound():
    (row,) = momentum_table(rules=("nnm+trimmed_mean",), alphas=(0.2,), rounds=1500)
    assert row["measured"] <= row["bound"]
    assert row["measured"] == pytest.approx(0.0625, rel=0.15)


def test_a_wrong_f_costs_what_the_formula_says():
    rows = misspecified_table()
    for row in rows:
        if row["f_hat"] >= row["f"]:
            assert row["measured"] == pytest.approx(row["floor"], rel=1e-6)
    under = [r["measured"] for r in rows if r["f_hat"] < r["f"]]
    assert under[2] > 50 * under[1] > 2000 * under[0] / 50


def test_a_spectral_attack_that_does_not_know_the_rule_breaks_gossip_from_2b_equal_mu_2_on(gossip):
    blind = [r for r in gossip if r["attack"] == "spectral" and r["knows_rule"] == "no"]
    assert {round(r["limit"], 2) for r in blind} >= {0.33, 0.5, 0.67, 1.0, 1.5, 2.0, 3.0}
    for row in blind:
        assert row["breaks"] == (row["limit"] >= 1.0 - 1e-9), row


def test_clip_2b_holds_under_every_attack_below_its_guarantee_and_under_none_from_mu_2_on(gossip):
    assert {(r["attack"].split("(")[0], r["knows_rule"]) for r in gossip} == {
        ("spectral", "no"), ("spectral", "yes"), ("dissensus", "no")
    }  # fmt: skip
    for row in gossip:
        if row["limit"] < 0.5 - 1e-9:
            assert not row["breaks"], row
        if row["limit"] >= 1.0 - 1e-9:
            assert row["breaks"], row


def test_between_its_guarantee_and_the_limit_it_depends_on_the_attack(gossip):
    between = [r for r in gossip if 0.5 + 1e-9 < r["limit"] < 1.0 - 1e-9]
    broken = {(r["attack"].split("(")[0], r["knows_rule"]) for r in between if r["breaks"]}
    assert broken == {("spectral", "yes"), ("dissensus", "no")}
    said = {c["claim"]: c for c in theory_claims({"gossip": gossip})}
    assert len(said) == 4
    assert all(c["holds"] for c in said.values())
    assert any("depends on the attack" in claim for claim in said)


def test_a_gossip_claim_falls_with_a_row_that_contradicts_it(gossip):
    for limit, breaks in ((0.4, True), (1.0, False)):
        wrong = {**gossip[0], "limit": limit, "breaks": breaks, "attack": "spectral", "knows_rule": "no"}
        fallen = [c for c in theory_claims({"gossip": [*gossip, wrong]}) if not c["holds"]]
        assert len(fallen) == 2


def test_plain_gossip_stands_still_under_dissensus_and_contracts_without_attack():
    graph, start = two_cliques(6, 3), split_start(6, 2, np.random.default_rng(0))
    quiet = contraction(graph, 0, make_peer_rule("gossip"), make_attack("none", 12, 0), start, 60)
    assert quiet[-1] < 1e-6
    held = contraction(graph, 2, make_peer_rule("gossip"), make_attack("dissensus", 14, 2), start, 40)
    assert held == pytest.approx(np.ones(41), abs=1e-9)


def test_clip_2b_contracts_on_the_complete_graph_below_the_limit():
    for row in complete_table(bs=(1, 3), rules=("clip_2b",), rounds=60):
        assert not row["breaks"]
        assert row["ratio"] < 1e-6


def test_columns_are_separate_problems():
    stack = np.random.default_rng(0).standard_normal((9, 4))
    for spec in ("trimmed_mean", "nnm+trimmed_mean", "geometric_median"):
        rule = make_rule(spec, 9, 2)
        one = [aggregate_columns(rule, stack[:, [k]])[0] for k in range(4)]
        assert aggregate_columns(rule, stack) == pytest.approx(one, abs=1e-12)


def test_every_figure_draws_from_its_rows(floors, momentum, gossip, tmp_path):
    from raysys.runtime.statistics import mean_ci

    cells = [
        {"rule": rule, "attack": attack, "interval": mean_ci([0.8, 0.9, 0.7])}
        for rule in ("mean", "median")
        for attack in ("none", "alie", "worst")
    ]
    curve = [{"round": t, "accuracy": 0.1 * t, "gradient_sq": 1.0 / (t + 1)} for t in range(5)]
    drawn = {
        "floors": figures.floors_figure(floors),
        "momentum": figures.momentum_figure(momentum),
        "gossip": figures.gossip_figure(gossip),
        "misspecified": figures.misspecified_figure(misspecified_table(rounds=40)),
        "matrix": figures.matrix_heat_map(cells, "digits"),
        "curves": figures.training_curves({"median": [curve, curve], "mean": [curve]}),
        "quadratic": figures.training_curves(
            {"a": [[{"round": 0, "excess_loss": 1.0}, {"round": 1, "excess_loss": 0.1}]]}
        ),
        "partition": figures.partition_figure(np.arange(12).reshape(4, 3), "iid"),
    }
    for name, figure in drawn.items():
        figure.savefig(tmp_path / f"{name}.png", dpi=50)
        axes = figure.axes[0]
        assert axes.get_xlabel(), name
        assert axes.get_ylabel(), name
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
    with pytest.raises(ValueError, match=r"\(nodes, classes\), got shape \(3,\)"):
        figures.partition_figure(np.arange(3))
