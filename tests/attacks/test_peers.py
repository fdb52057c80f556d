import numpy as np
import pytest
import torch

from raysys.aggregation.neighbours import make_peer_rule
from raysys.attacks import ATTACKS, Threat, make_attack
from raysys.graph import complete, erdos_renyi, metropolis_hastings, two_cliques

P2P = ["dissensus", "spectral", "equivocation"]


def network(b=2, h=8, d=4, seed=0):
    """Honest peers 0..h-1 in a complete graph with b Byzantine ones; models, mixing, Byzantine ids."""
    n = h + b
    models = torch.from_numpy(np.random.default_rng(seed).standard_normal((n, d)))
    return models, metropolis_hastings(complete(n)), list(range(h, n))


def threat(n, f, rule=None, seed=0):
    return Threat(n=n, f=f, round=0, rng=np.random.default_rng(seed), rule=rule)


def gossip_round(models, mixing, byzantine, said, rule="gossip", b=2):
    honest = [i for i in range(len(models)) if i not in byzantine]
    rows = []
    for i in honest:
        near = [j for j in range(len(models)) if j != i and mixing[i, j] > 0]
        heard = torch.stack([said[j, i] if j in byzantine else models[j] for j in near])
        rows.append(make_peer_rule(rule).mix(models[i], heard, mixing[i, near], b))
    return torch.stack(rows)


def test_dissensus_with_epsilon_one_leaves_plain_gossip_stationary():
    models, mixing, byzantine = network()
    said = make_attack("dissensus", 10, 2).craft_edges(models, mixing, byzantine, threat(10, 2))
    after = gossip_round(models, mixing, byzantine, said)
    assert torch.allclose(after, models[:8], atol=1e-12)


def test_dissensus_on_an_irregular_graph_is_stationary_where_a_byzantine_neighbour_is():
    graph = erdos_renyi(12, 0.5, np.random.default_rng(2))
    models, mixing = torch.from_numpy(np.random.default_rng(1).standard_normal((12, 3))), metropolis_hastings(graph)
    byzantine = [3, 7]
    said = make_attack("dissensus", 12, 2).craft_edges(models, mixing, byzantine, threat(12, 2))
    after = gossip_round(models, mixing, byzantine, said)
    honest = [i for i in range(12) if i not in byzantine]
    for k, i in enumerate(honest):
        if graph.adjacency[i, byzantine].any():
            assert torch.allclose(after[k], models[i], atol=1e-12)


def test_dissensus_with_epsilon_zero_repeats_the_receivers_own_model():
    models, mixing, byzantine = network()
    said = make_attack("dissensus(epsilon=0.0)", 10, 2).craft_edges(models, mixing, byzantine, threat(10, 2))
    assert all(torch.equal(v, models[i]) for (_, i), v in said.items())


@pytest.mark.parametrize("attack", sorted(set(ATTACKS) - {"opt_alie", "opt_ipm", "best_response", "hidden"}))
def test_messages_go_to_honest_neighbours_only_and_once_an_edge(attack):
    graph = two_cliques(5, 2)
    mixing, models = metropolis_hastings(graph), torch.from_numpy(np.random.default_rng(0).standard_normal((10, 3)))
    byzantine = [2, 8]
    said = make_attack(attack, 10, 2).craft_edges(models, mixing, byzantine, threat(10, 2))
    expected = {(b, i) for b in byzantine for i in range(10) if i not in byzantine and graph.adjacency[b, i]}
    assert set(said) == expected
    assert all(v.shape == (3,) and v.dtype == models.dtype for v in said.values())


@pytest.mark.parametrize("attack", ["opt_alie", "best_response", "spectral", "equivocation"])
@pytest.mark.parametrize("rule", ["clip_2b", "nna", "gossip"])
def test_attacks_try_the_peer_rule_when_they_know_it(attack, rule):
    models, mixing, byzantine = network()
    known = make_attack(attack, 10, 2).craft_edges(models, mixing, byzantine, threat(10, 2, make_peer_rule(rule)))
    again = make_attack(attack, 10, 2).craft_edges(models, mixing, byzantine, threat(10, 2, make_peer_rule(rule)))
    assert len(known) == 16
    assert all(torch.equal(known[e], again[e]) for e in known)
    assert all(v.isfinite().all() for v in known.values())


def test_spectral_pushes_each_side_along_the_slow_mode():
    graph = two_cliques(6, 1)
    mixing = np.zeros((14, 14))
    mixing[:12, :12] = graph.adjacency * 0.1
    mixing[:12, 12:] = mixing[12:, :12] = 0.1
    x = torch.cat([torch.ones(6, 2), -torch.ones(6, 2), torch.zeros(2, 2)]).double()
    x[:12] += 0.01 * torch.from_numpy(np.random.default_rng(0).standard_normal((12, 2)))
    said = make_attack("spectral", 14, 2).craft_edges(x, mixing, [12, 13], threat(14, 2))
    for (_, i), message in said.items():
        outwards = 1.0 if i < 6 else -1.0
        push = message - x[i]
        assert float(push @ torch.ones(2, dtype=torch.float64)) * outwards > 0
        assert abs(float(push[0] - push[1])) < 0.1 * float(push.norm())


def test_equivocation_tells_different_peers_different_things_and_widens_the_gap():
    models, mixing, byzantine = network()
    said = make_attack("equivocation", 10, 2).craft_edges(models, mixing, byzantine, threat(10, 2))
    pushes = torch.stack([said[8, i] - models[i] for i in range(8)])
    unit = pushes / pushes.norm(dim=1, keepdim=True)
    assert torch.allclose((unit @ unit.T).abs(), torch.ones(8, 8, dtype=torch.float64), atol=1e-9)
    assert len(torch.unique((unit @ unit[0]).sign())) == 2


def test_knowing_the_rule_never_pushes_less_far_along_the_direction():
    models, mixing, byzantine = network(seed=3)
    rule = make_peer_rule("nna")
    blind = make_attack("spectral", 10, 2).craft_edges(models, mixing, byzantine, threat(10, 2))
    knowing = make_attack("spectral", 10, 2).craft_edges(models, mixing, byzantine, threat(10, 2, rule))
    after = {
        name: gossip_round(models, mixing, byzantine, said, "nna") for name, said in (("b", blind), ("k", knowing))
    }
    gap = {name: float((x - x.mean(0)).square().sum()) for name, x in after.items()}
    assert gap["k"] >= gap["b"] * 0.99


@pytest.mark.parametrize("attack", P2P)
def test_peer_attacks_have_no_message_for_a_server(attack):
    with pytest.raises(ValueError, match="no message for a server"):
        make_attack(attack, 5, 1).craft(torch.ones(4, 2), threat(5, 1))


@pytest.mark.parametrize("attack", [*P2P, "alie", "mimic"])
def test_equal_models_and_half_precision_are_no_obstacle(attack):
    _, mixing, byzantine = network()
    models = torch.ones(10, 4, dtype=torch.bfloat16)
    said = make_attack(attack, 10, 2).craft_edges(models, mixing, byzantine, threat(10, 2))
    assert all(v.dtype == torch.bfloat16 and torch.equal(v, models[0]) for v in said.values())


def test_mimic_copies_one_honest_peer_for_the_whole_network():
    models, mixing, byzantine = network()
    said = make_attack("mimic", 10, 2).craft_edges(models, mixing, byzantine, threat(10, 2))
    assert len({tuple(v.tolist()) for v in said.values()}) == 1
    assert tuple(next(iter(said.values())).tolist()) in {tuple(row.tolist()) for row in models[:8]}


def test_no_byzantine_peer_says_nothing():
    models, mixing, _ = network()
    for attack in [*P2P, "alie"]:
        assert make_attack(attack, 10, 0).craft_edges(models, mixing, [], threat(10, 0)) == {}
