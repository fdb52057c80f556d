import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysys.graph import (
    GRAPHS,
    Graph,
    algebraic_connectivity,
    complete,
    erdos_renyi,
    exponential,
    fiedler_vector,
    make_graph,
    random_regular,
    ring,
    small_world,
    star,
    torus,
    two_cliques,
)


@pytest.mark.parametrize("n", [3, 4, 7, 20])
def test_ring_connectivity_closed_form(n):
    assert algebraic_connectivity(ring(n)) == pytest.approx(2 * (1 - np.cos(2 * np.pi / n)), abs=1e-12)


@pytest.mark.parametrize("n", [2, 5, 13])
def test_complete_connectivity_is_n(n):
    assert algebraic_connectivity(complete(n)) == pytest.approx(n, abs=1e-12)


@pytest.mark.parametrize("n", [3, 6, 17])
def test_star_connectivity_is_one(n):
    assert algebraic_connectivity(star(n)) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize(("rows", "columns"), [(3, 3), (3, 5), (4, 6), (1, 7)])
def test_torus_connectivity_closed_form(rows, columns):
    expected = 2 * (1 - np.cos(2 * np.pi / max(rows, columns)))
    assert algebraic_connectivity(torus(rows, columns)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("size", "matchings"), [(6, 1), (6, 2), (6, 3), (8, 4), (3, 1)])
def test_two_cliques_connectivity_is_twice_the_matchings(size, matchings):
    graph = two_cliques(size, matchings)
    assert algebraic_connectivity(graph) == pytest.approx(2 * matchings, abs=1e-12)
    assert (graph.degree == size - 1 + matchings).all()


def test_two_cliques_fiedler_vector_separates_the_cliques():
    vector = fiedler_vector(two_cliques(6, 2))
    assert np.abs(np.abs(vector) - 1 / np.sqrt(12)).max() < 1e-12
    assert len(set(np.sign(vector[:6]))) == len(set(np.sign(vector[6:]))) == 1
    assert np.sign(vector[0]) != np.sign(vector[6])


def test_exponential_graph_on_sixteen_peers_has_the_known_degree_and_diameter():
    graph = exponential(16)
    assert (graph.degree == 7).all()  # +-1, +-2, +-4, 8
    reach = np.linalg.matrix_power(graph.adjacency.astype(int) + np.eye(16, dtype=int), 3)
    assert (reach > 0).all()


def test_random_regular_is_regular_and_connected():
    graph = random_regular(15, 4, np.random.default_rng(3))
    assert (graph.degree == 4).all()
    assert graph.is_connected()


def test_small_world_keeps_the_number_of_edges():
    assert small_world(20, np.random.default_rng(0), degree=6, rewire=0.3).edge_count == 60


@pytest.mark.parametrize("name", sorted(GRAPHS))
def test_every_named_graph_is_connected_and_repeats_under_its_seed(name):
    first, again = (make_graph(name, 12, np.random.default_rng(5)) for _ in range(2))
    assert first.n == 12
    assert first.is_connected()
    assert first == again
    assert hash(first) == hash(again)


@pytest.mark.parametrize(
    ("spec", "n", "message"),
    [
        ("rng", 5, "unknown graph 'rng'"),
        ("ring(k=2)", 5, "unexpected keyword argument 'k'"),
        ("ring(2)", 5, "key=value"),
        ("__import__('os').getcwd()", 5, "not of the form key=value"),
        ("two_cliques(matchings=7)", 12, "1 <= matchings <= size, got size=6, matchings=7"),
        ("two_cliques", 7, "even number of peers, got n=7"),
        ("random_regular(degree=3)", 5, "n=5, degree=3"),
        ("torus(rows=5)", 12, "rows=5"),
        ("erdos_renyi(p=0.0)", 6, "no connected graph"),
        ("erdos_renyi(p=2)", 6, r"probability in \[0, 1\], got p=2"),
        ("small_world(degree=3)", 9, "even degree"),
        ("ring", 2, "n >= 3, got 2"),
    ],
)
def test_a_wrong_graph_is_refused_with_its_value(spec, n, message):
    with pytest.raises(ValueError, match=message):
        make_graph(spec, n, np.random.default_rng(0))


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 14), st.floats(0, 1), st.integers(0, 10**6))
def test_graph_survives_networkx_and_edge_lists(n, p, seed):
    graph = erdos_renyi(n, p, np.random.default_rng(seed), connected=False)
    assert Graph.from_networkx(graph.to_networkx()) == graph
    assert Graph.from_edges(n, [tuple(edge) for edge in graph.edges()]) == graph
    assert (graph.degree == [len(graph.neighbours(i)) for i in range(n)]).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 12), st.floats(0, 1), st.integers(0, 10**6))
def test_connectivity_is_zero_exactly_when_disconnected(n, p, seed):
    graph = erdos_renyi(n, p, np.random.default_rng(seed), connected=False)
    assert (algebraic_connectivity(graph) > 1e-9) == graph.is_connected()


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (np.ones((2, 3)), "square"),
        (np.eye(2), "loop at 0"),
        (np.array([[0, 1], [0, 0]]), "edge 0 -> 1 in one direction"),
    ],
)
def test_a_matrix_that_is_no_graph_is_refused(matrix, message):
    with pytest.raises(ValueError, match=message):
        Graph(matrix)


def test_subgraph_keeps_the_edges_among_its_peers():
    assert complete(6).subgraph([1, 3, 5]) == complete(3)
    assert ring(6).subgraph([0, 2, 4]).edge_count == 0
    assert (ring(6).byzantine_neighbours([0, 1]) == [1, 1, 1, 0, 0, 1]).all()
