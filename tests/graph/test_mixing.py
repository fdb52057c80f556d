import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysys.graph import (
    complete,
    erdos_renyi,
    gossip_limit,
    honest_connectivity,
    laplacian,
    lazy,
    max_degree,
    metropolis_hastings,
    ring,
    spectral_gap,
    star,
    two_cliques,
    uniform,
)

GRAPHS = st.builds(
    lambda n, p, seed: erdos_renyi(n, p, np.random.default_rng(seed), connected=False),
    st.integers(2, 14),
    st.floats(0, 1),
    st.integers(0, 10**6),
)


@settings(max_examples=60, deadline=None)
@given(GRAPHS, st.sampled_from([metropolis_hastings, max_degree]), st.floats(0, 0.99))
def test_symmetric_mixing_is_doubly_stochastic_on_the_edges_of_its_graph(graph, mixing, stay):
    for matrix in (mixing(graph), lazy(mixing(graph), stay)):
        assert np.abs(matrix.sum(0) - 1).max() < 1e-12
        assert np.abs(matrix.sum(1) - 1).max() < 1e-12
        assert (matrix >= -1e-12).all()
        assert np.array_equal(matrix, matrix.T)
        off = ~np.eye(graph.n, dtype=bool)
        assert np.array_equal(matrix[off] > 0, graph.adjacency[off])


@settings(max_examples=40, deadline=None)
@given(GRAPHS)
def test_uniform_mixing_is_row_stochastic(graph):
    matrix = uniform(graph)
    assert np.abs(matrix.sum(1) - 1).max() < 1e-12
    assert (matrix >= 0).all()


def test_max_degree_mixing_is_a_laplacian_step():
    graph = star(6)
    assert np.abs(max_degree(graph) - (np.eye(6) - laplacian(graph) / 6)).max() < 1e-12


@pytest.mark.parametrize("n", [5, 8])
def test_ring_gap_closed_form(n):
    assert spectral_gap(metropolis_hastings(ring(n))) == pytest.approx(
        1 - max(abs(1 / 3 + 2 / 3 * np.cos(2 * np.pi * k / n)) for k in range(1, n)), abs=1e-12
    )


def test_complete_graph_mixes_in_one_round():
    assert spectral_gap(metropolis_hastings(complete(7))) == pytest.approx(1.0, abs=1e-12)


def test_lazy_mixing_has_no_negative_eigenvalue():
    assert np.linalg.eigvalsh(lazy(metropolis_hastings(ring(6)))).min() > -1e-12
    with pytest.raises(ValueError, match=r"got 1\.0"):
        lazy(np.eye(2), 1.0)


@pytest.mark.parametrize(("b", "matchings", "expected"), [(1, 1, 1.0), (3, 3, 1.0), (1, 3, 1 / 3), (2, 3, 2 / 3)])
def test_gossip_limit_of_two_cliques(b, matchings, expected):
    assert gossip_limit(two_cliques(6, matchings), b) == pytest.approx(expected)


def test_gossip_limit_of_a_disconnected_honest_graph_is_infinite():
    assert honest_connectivity(star(5), byzantine=[0]) == 0.0
    assert gossip_limit(star(5).subgraph([1, 2, 3]), 1) == float("inf")
    assert honest_connectivity(complete(6), byzantine=[4, 5]) == pytest.approx(4.0)
