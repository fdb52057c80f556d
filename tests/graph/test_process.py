import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysys.graph import FAMILIES, GRAPHS, MIXING, base_graph, complete, contraction, make_process, metropolis_hastings
from raysys.graph.links import waypoint_positions

DEFAULT = "metropolis_hastings"
UNDIRECTED = [
    "ring", "complete", "star", "exponential", "torus(rows=2)", "small_world(degree=4)", "two_cliques",
    "static(erdos_renyi(p=0.5))", "static(random_regular(degree=3))", "erdos_renyi(p=0.05)", "erdos_renyi(p=0.5)",
    "random_regular(degree=3)", "matching", "matching(p=0.1)", "waypoint(radius=0.3, speed=0.1)", "ring+dropout(p=0.2)",
    "matching+dropout(p=0.5)", "erdos_renyi(p=0.3)+dropout(p=0.3)",
]  # fmt: skip
OWN = ["finite_time(k=1)", "finite_time(k=3)", "finite_time(k=2)+dropout(p=0.3)"]
DIRECTED = ["one_peer_exponential", "one_peer_exponential+dropout(p=0.3)"]


def rng(*key):
    return np.random.default_rng(key)


def make(spec, n=10, weights=DEFAULT, seed=0):
    return make_process(spec, n, weights, rng(seed))


# spec 5.4, no. 1
@settings(max_examples=120, deadline=None)
@given(
    st.sampled_from(UNDIRECTED + OWN),
    st.sampled_from(["metropolis_hastings", "max_degree", "laplacian", "lazy"]),
    st.integers(0, 10**6),
    st.lists(st.booleans(), min_size=10, max_size=10),
)
def test_mixing_is_symmetric_doubly_stochastic_and_contracts_whoever_is_present(spec, weights, seed, present):
    present = np.array(present)
    process = make(spec, 10, DEFAULT if spec in OWN else weights, seed)
    matrix = process.mixing(seed, rng(seed, 1), present)
    assert not process.directed
    assert np.abs(matrix.sum(0) - 1).max() < 1e-12
    assert np.abs(matrix.sum(1) - 1).max() < 1e-12
    assert np.array_equal(matrix, matrix.T)
    assert matrix.min() >= -1e-12
    values = np.linalg.eigvalsh(matrix)
    assert values[0] > -1 + 1e-9
    assert values[-1] < 1 + 1e-12
    assert np.array_equal(matrix[~present], np.eye(10)[~present])
    if present.all():
        assert np.array_equal(matrix, process.mixing(seed, rng(seed, 1)))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(DIRECTED), st.integers(0, 10**6), st.lists(st.booleans(), min_size=10, max_size=10))
def test_directed_mixing_is_column_stochastic_among_the_present(spec, seed, present):
    present = np.array(present)
    process = make(spec, 10)
    matrix = process.mixing(seed, rng(seed), present)
    assert process.directed
    assert np.abs(matrix.sum(0) - 1).max() < 1e-12
    assert matrix.min() >= 0
    assert np.array_equal(matrix[~present], np.eye(10)[~present])
    assert np.array_equal(matrix[:, ~present], np.eye(10)[:, ~present])


# spec 5.4, no. 1
@pytest.mark.parametrize("spec", ["erdos_renyi(p=0.02)", "matching(p=0.05)", "waypoint(radius=0.1, speed=0.1)"])
def test_a_graph_may_fall_apart_and_is_not_repaired(spec):
    process = make(spec)
    alone = [
        np.array_equal(w[i], np.eye(10)[i]) for t in range(30) for w in [process.mixing(t, rng(t))] for i in range(10)
    ]
    assert any(alone)
    assert not all(alone)


# spec 5.4, no. 1
@pytest.mark.parametrize("weights", ["metropolis_hastings", "max_degree", "laplacian", "lazy"])
@pytest.mark.parametrize("spec", ["erdos_renyi(p=0.0)", "matching(p=0.0)", "ring+dropout(p=1.0)"])
def test_no_edge_mixes_nothing(spec, weights):
    assert np.array_equal(make(spec, 6, weights).mixing(0, rng(0)), np.eye(6))


# spec 5.4, no. 1
def test_complete_graph_mixes_to_the_mean_at_once():
    assert np.abs(make("complete", 7).mixing(0, rng(0)) - 1 / 7).max() < 1e-15
    assert np.abs(make("erdos_renyi(p=1.0)", 7).mixing(3, rng(0)) - 1 / 7).max() < 1e-15


# spec 5.4, no. 1
@pytest.mark.parametrize(
    ("weights", "share"), [("metropolis_hastings", 1 / 3), ("max_degree", 1 / 3), ("laplacian", 1 / 6), ("lazy", 1 / 6)]
)
@pytest.mark.parametrize("n", [6, 10])
def test_ring_eigenvalues_have_the_closed_form(weights, share, n):
    values = np.linalg.eigvalsh(make("ring", n, weights).mixing(0, rng(0)))
    expected = 1 - share * (2 - 2 * np.cos(2 * np.pi * np.arange(n) / n))
    assert np.abs(values - np.sort(expected)).max() < 1e-12


# spec 5.4, no. 1
@pytest.mark.parametrize("power", range(1, 7))
def test_one_peer_exponential_reaches_the_mean_in_log2_n_rounds(power):
    n = 2**power
    process = make("one_peer_exponential", n)
    assert process.period == power
    product = np.eye(n)
    for t in range(power):
        assert (np.count_nonzero(process.mixing(t, rng(t)), axis=1) == 2).all()
        product = process.mixing(t, rng(t)) @ product
    assert np.abs(product - 1 / n).max() < 1e-15


def test_one_peer_exponential_hears_the_peer_two_to_the_round_behind():
    process = make("one_peer_exponential", 10)
    for t in (0, 1, 2, 3, 4, 7):
        assert (process.mixing(t, rng(0))[np.arange(10), (np.arange(10) - 2 ** (t % 4)) % 10] == 0.5).all()


# spec 5.4, no. 1
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_finite_time_graphs_reach_the_mean_for_every_number_of_peers(k):
    for n in range(2, 41):
        rounds = base_graph(n, k)
        product = np.eye(n)
        for matrix in rounds:
            assert np.array_equal(matrix, matrix.T)
            assert np.abs(matrix.sum(0) - 1).max() < 1e-12
            assert matrix.min() > -1e-12
            assert ((matrix > 1e-12).sum(1) <= k + 1).all()
            product = matrix @ product
        assert np.abs(product - 1 / n).max() < 1e-12, n
        assert len(rounds) <= 2 * np.log(n) / np.log(k + 1) + 2, n  # the paper's theorem 1


def test_finite_time_lengths_are_those_of_the_paper():
    assert [len(base_graph(n, 1)) for n in (2, 4, 5, 6, 8)] == [1, 2, 5, 4, 3]
    assert [len(base_graph(n, 2)) for n in (3, 9, 27)] == [1, 2, 3]
    assert make("finite_time(k=1)", 6).period == 4
    with pytest.raises(ValueError, match="got n=3, k=0"):
        base_graph(3, 0)


def test_matching_pairs_everybody_and_without_p_all_pairs_alike():
    process = make("matching", 6)
    met = sum(process.mixing(t, rng(t)) for t in range(3000)) / 3000
    assert np.abs(met[~np.eye(6, dtype=bool)] - 0.1).max() < 0.02
    for t in range(20):
        assert np.array_equal(np.sort(process.mixing(t, rng(t))[0])[-2:], [0.5, 0.5])
        assert np.trace(make("matching", 7).mixing(t, rng(t))) == 4.0


def test_meetings_are_a_maximal_matching():
    process = make("matching(p=1.0)", 9, "pairwise")
    for t in range(20):
        matrix = process.mixing(t, rng(t))
        assert np.trace(matrix) == 5.0  # everybody meets everybody: four pairs and one left over
        assert np.abs(matrix @ matrix - matrix).max() < 1e-15


def test_waypoint_positions_move_at_the_speed_and_stay_in_the_square():
    far = np.array([waypoint_positions(20, 5, 0.03 * t) for t in range(200)])
    assert far.min() >= 0
    assert far.max() <= 1
    assert np.sqrt((np.diff(far, axis=0) ** 2).sum(2)).max() <= 0.03 + 1e-12
    assert np.array_equal(far[0], np.random.default_rng(5).random((4, 20, 2))[0])


def test_waypoint_contacts_change_little_by_little():
    process = make("waypoint(radius=0.4, speed=0.02)", 20)
    first, second, later = (process.mixing(t, rng(0)) > 0 for t in (10, 11, 60))
    assert 0 < (first != second).sum() < (first != later).sum()


# spec 5.4, no. 15: what the graph has to do with a replay
@pytest.mark.parametrize("spec", UNDIRECTED + OWN + DIRECTED)
def test_a_round_needs_neither_history_nor_the_other_rounds(spec):
    process, again = make(spec, 12, seed=3), make(spec, 12, seed=3)
    present = np.arange(12) != 4
    for t in range(9):
        process.mixing(t, rng(7, t))
    assert np.array_equal(process.mixing(9, rng(7, 9)), again.mixing(9, rng(7, 9)))
    links = process.mixing(9, rng(7, 9)) != 0
    lost = process.mixing(9, rng(7, 9), present) != 0
    assert not (lost & ~links).any()  # who is lost adds no edge and moves no draw
    inside = np.ix_(present, present)
    assert np.array_equal(lost[inside] | np.eye(11, dtype=bool), links[inside] | np.eye(11, dtype=bool))


# spec 5.4, no. 15
@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["metropolis_hastings", "max_degree", "laplacian", "lazy"]), st.permutations(list(range(8))))
def test_relabelling_peers_relabels_the_weights(weights, order):
    from raysys.graph import Graph, small_world

    graph = small_world(8, rng(1))
    moved = Graph(graph.adjacency[np.ix_(order, order)])
    assert np.abs(MIXING[weights](moved) - MIXING[weights](graph)[np.ix_(order, order)]).max() < 1e-12


def test_dropout_takes_both_directions_of_an_edge_at_its_rate():
    process = make("complete+dropout(p=0.25)", 12)
    kept = np.array([process.mixing(t, rng(t)) > 0 for t in range(400)])
    assert np.array_equal(kept, kept.transpose(0, 2, 1))
    assert kept[:, *np.triu_indices(12, 1)].mean() == pytest.approx(0.75, abs=0.01)


def test_an_erased_edge_of_a_finite_time_graph_gives_its_weight_back_to_both_ends():
    full, lost = (make("finite_time(k=2)", 6).mixing(0, rng(0), p) for p in (None, np.arange(6) != 1))
    ends = np.flatnonzero(full[1])
    for i in ends[ends != 1]:
        assert lost[i, i] == pytest.approx(full[i, i] + full[i, 1])


def test_static_keeps_one_connected_graph_where_the_bare_name_draws_anew():
    static, anew = make("static(erdos_renyi(p=0.4))", 12), make("erdos_renyi(p=0.4)", 12)
    assert static.period == 1
    assert anew.period is None
    assert np.array_equal(static.mixing(0, rng(0)), static.mixing(5, rng(5)))
    assert contraction(static.mixing(0, rng(0))) < 1
    assert not np.array_equal(anew.mixing(0, rng(0)), anew.mixing(5, rng(5)))


def test_weights_follow_from_what_the_lost_leave():
    present = np.arange(6) < 4
    matrix = make("complete", 6).mixing(0, rng(0), present)
    assert np.array_equal(matrix[:4, :4], metropolis_hastings(complete(4)))


@pytest.mark.parametrize(
    ("spec", "weights", "message"),
    [
        ("foo", DEFAULT, "unknown graph process 'foo', the processes are complete, .* and static"),
        ("", DEFAULT, "not of the form name"),
        ("ring(k=3)", DEFAULT, "unexpected keyword argument 'k'"),
        ("ring+foo", DEFAULT, r"takes dropout\(p=P\) with P in \[0, 1\], got 'ring\+foo'"),
        ("ring+dropout(p=1.5)", DEFAULT, "got .*1.5"),
        ("ring+dropout", DEFAULT, "dropout"),
        ("ring+dropout(p=0.1)+dropout(p=0.1)", DEFAULT, "dropout"),
        ("erdos_renyi", DEFAULT, r"erdos_renyi needs p=\.\.\."),
        ("erdos_renyi(p=high)", DEFAULT, "p of type float, got 'high'"),
        ("erdos_renyi(p=1.5)", DEFAULT, r"probability p in \[0, 1\], got 1.5"),
        ("erdos_renyi(q=0.5)", DEFAULT, "no option 'q'; it has p"),
        ("matching(p=-1)", DEFAULT, "got -1"),
        ("random_regular(degree=11)", DEFAULT, "n=10, degree=11"),
        ("finite_time(k=0)", DEFAULT, "k=0"),
        ("waypoint(radius=0.1)", DEFAULT, r"waypoint needs speed=\.\.\."),
        ("waypoint(radius=0.0, speed=0.1)", DEFAULT, "radius=0.0"),
        ("static(matching)", DEFAULT, "unknown graph 'matching'"),
        ("ring", "uniform", "row-stochastic only and move the average; allowed: metropolis_hastings"),
        ("ring", "pairwise", "'pairwise' is no rule for ring"),
        ("finite_time", "lazy", "weights of its own"),
        ("ring", "heavy", "'heavy' is no rule"),
    ],
)
def test_a_wrong_process_is_refused_in_one_sentence(spec, weights, message):
    with pytest.raises(ValueError, match=message) as error:
        make(spec, 10, weights)
    assert "\n" not in str(error.value)


def test_every_family_and_graph_is_a_process():
    options = {"erdos_renyi": "(p=0.3)", "waypoint": "(radius=0.3, speed=0.1)"}
    for name in {*FAMILIES, *GRAPHS}:
        assert make(name + options.get(name, ""), 12).mixing(0, rng(0)).shape == (12, 12)
    with pytest.raises(ValueError, match="n >= 2 peers, got 1"):
        make("one_peer_exponential", 1)
