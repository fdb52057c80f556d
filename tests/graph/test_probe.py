import numpy as np
import pytest

from raysys.graph import Probe, contraction_closed_form, contraction_monte_carlo, make_process
from raysys.runtime.seeds import Seeds, Stream
from raysys.systems.tad_lora.interval import select_interval

N, ROUNDS = 10, 100


def law(rho):
    return select_interval(rho, 2.5, 150)


GRID = [t for t in range(1, 38) if 150 % t == 0]


def mixing_of(spec, seed, n=N):
    seeds = Seeds(seed)
    process = make_process(spec, n, "metropolis_hastings", seeds.rng(Stream.GRAPH, 0, -1))
    return process, lambda t: process.mixing(t, seeds.rng(Stream.GRAPH, 0, t))


def drive(mixing, seed, rounds=ROUNDS, blocks=(range(N),), start=0, spoil=None):
    """Blocks of peers that hear all messages of a round; `spoil(ids, rows)` may damage them on the way."""
    probes = [Probe(np.array(block), Seeds(seed), rounds) for block in blocks]
    for t in range(start, rounds):
        ids = np.concatenate([probe.nodes for probe in probes])
        rows = np.concatenate([probe.message(t) for probe in probes])
        if spoil:
            ids, rows = spoil(ids, rows)
        for probe in probes:
            probe.mix(t, ids, rows, mixing(t)[probe.nodes])
    return probes


# issue 3, bar 4
@pytest.mark.parametrize("p", [0.5, 0.2, 0.1, 0.05])
def test_the_probe_finds_the_interval_of_the_closed_form_within_one_step_and_all_peers_agree(p):
    for seed in range(8):
        process, mixing = mixing_of(f"erdos_renyi(p={p})", seed)
        (probe,) = drive(mixing, seed)
        chosen = probe.interval(law)
        rho = contraction_closed_form(process)
        assert (chosen == chosen[0]).all()
        assert abs(GRID.index(chosen[0]) - GRID.index(law(rho))) <= 1
        assert np.abs(probe.rho - rho).max() < 0.15


@pytest.mark.parametrize(
    ("spec", "short"),
    [("ring", 0.01), ("star", 0.01), ("torus(rows=2)", 0.01), ("complete", 0.0), ("static(erdos_renyi(p=0.3))", 0.07)],
)
def test_the_probe_finds_the_second_eigenvalue_of_a_fixed_graph_from_below(spec, short):
    process, mixing = mixing_of(spec, 3)
    (probe,) = drive(mixing, 3)
    rho = contraction_closed_form(process)
    assert rho - short <= probe.agreed.max() <= rho + 1e-3
    assert probe.settled.all()


def test_the_probe_is_right_on_average():
    for spec in ("matching(p=0.1)", "erdos_renyi(p=0.1)"):
        process, _ = mixing_of(spec, 0)
        found = [drive(mixing_of(spec, seed)[1], seed)[0].rho.mean() for seed in range(16)]
        expected = contraction_monte_carlo(process, 2000, np.random.default_rng(0))
        assert np.mean(found) == pytest.approx(expected, abs=0.04)


def test_a_graph_without_edges_has_rho_one_and_nobody_settled():
    (probe,) = drive(lambda t: np.eye(N), 0, rounds=20)
    assert (probe.agreed == 1.0).all()
    assert not probe.settled.any()
    assert (probe.interval(law) == 30).all()


# spec 5.4, no. 15
def test_the_probe_gives_the_same_bits_however_peers_are_spread_over_hosts():
    _, mixing = mixing_of("erdos_renyi(p=0.2)", 5)
    (whole,) = drive(mixing, 5, 40)
    parts = drive(mixing, 5, 40, blocks=([7, 2], [0], [9, 1, 3, 4], [5, 6, 8]))
    for name in ("rho", "agreed", "settled"):
        together = np.empty(N)
        for part in parts:
            together[part.nodes] = getattr(part, name)
        assert np.array_equal(together, getattr(whole, name))


# spec 5.4, no. 15
def test_a_nan_in_one_component_never_reaches_the_other():
    mixing = np.zeros((N, N))
    mixing[:5, :5] = mixing[5:, 5:] = 0.2 * (0.5 + 0.5 * np.eye(5)) + 0.4 * (np.eye(5))
    mixing += np.diag(1 - mixing.sum(1))

    def spoil(ids, rows):
        return ids, np.where((ids >= 5)[:, None], np.nan, rows).astype(np.float32)

    (clean,), (spoilt,) = drive(lambda t: mixing, 1, 40), drive(lambda t: mixing, 1, 40, spoil=spoil)
    assert np.array_equal(clean.state[:5], spoilt.state[:5])
    assert np.array_equal(clean.agreed[:5], spoilt.agreed[:5])
    assert np.isfinite(spoilt.state).all()  # a peer that hears nothing but NaN keeps to itself
    assert (spoilt.agreed[5:] == 1.0).all()


def test_a_message_that_is_lost_leaves_its_weight_with_the_receiver():
    _, mixing = mixing_of("complete", 0)
    (probe,) = drive(mixing, 0, 20, spoil=lambda ids, rows: (ids[1:], rows[1:]))
    assert np.isfinite(probe.state).all()
    assert probe.settled[1:].all()


def test_a_probe_goes_on_from_a_barrier_with_the_same_bits():
    _, mixing = mixing_of("erdos_renyi(p=0.1)", 2)
    for barrier in (13, 71):
        first, again = Probe(np.arange(N), Seeds(2), ROUNDS), Probe(np.arange(N), Seeds(2), ROUNDS)
        for t in range(ROUNDS):
            if t == barrier:
                again.load_state_dict(first.state_dict())
            for probe in (first, again) if t >= barrier else (first,):
                probe.mix(t, np.arange(N), probe.message(t), mixing(t))
        assert np.array_equal(first.agreed, again.agreed)
        assert np.array_equal(first.settled, again.settled)


def test_too_few_agreement_rounds_are_reported_not_hidden():
    _, mixing = mixing_of("erdos_renyi(p=0.01)", 4)
    (probe,) = drive(mixing, 4, 30)
    assert len(set(probe.agreed)) > 1
    assert not probe.settled.all()


def test_a_probe_of_too_few_rounds_is_refused():
    with pytest.raises(ValueError, match="at least 20 rounds, got 19"):
        Probe(np.arange(2), Seeds(0), 19)
