"""Spectral quantities of graphs and mixing matrices.

Notation: L = D - A the graph Laplacian with eigenvalues 0 = mu_1 <= mu_2 <= ... <= mu_max; mu_2 is the algebraic
connectivity. W a mixing matrix with eigenvalues 1 = lambda_1 >= lambda_2 >= ... >= lambda_n >= -1.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from raysys.graph.graph import Graph


def laplacian(graph: Graph) -> NDArray[np.float64]:
    """(n, n) D - A."""
    return np.diag(graph.degree.astype(np.float64)) - graph.adjacency.astype(np.float64)


def algebraic_connectivity(graph: Graph) -> float:
    """mu_2 of the Laplacian; 0 exactly when the graph is not connected."""
    if graph.n == 1 or not graph.is_connected():
        return 0.0
    return float(np.linalg.eigvalsh(laplacian(graph))[1])


@lru_cache(maxsize=64)
def fiedler_vector(graph: Graph) -> NDArray[np.float64]:
    """(n,) unit eigenvector of mu_2, its largest entry positive, read-only. With a multiple mu_2 it is one of several."""
    if graph.n < 2:
        raise ValueError("a graph of one peer has no Fiedler vector")
    vector = np.linalg.eigh(laplacian(graph))[1][:, 1]
    vector = vector * np.sign(vector[np.abs(vector).argmax()])
    vector.setflags(write=False)
    return vector


def spectral_gap(mixing: NDArray[np.float64]) -> float:
    """1 - max(|lambda_2|, |lambda_n|): plain gossip contracts the distance to the average by one minus this a round.

    Works for any matrix with rows summing to one; for symmetric ones it is computed by a symmetric solver.
    """
    if len(mixing) == 1:
        return 1.0
    symmetric = np.array_equal(mixing, mixing.T)
    values = np.linalg.eigvalsh(mixing) if symmetric else np.linalg.eigvals(mixing)
    return float(1.0 - np.sort(np.abs(values))[-2])


def honest_connectivity(graph: Graph, byzantine: Iterable[int]) -> float:
    """mu_2 of the subgraph of honest peers: the quantity robust gossip is limited by."""
    bad = set(byzantine)
    honest = [i for i in range(graph.n) if i not in bad]
    if not honest:
        raise ValueError("no honest peer is left")
    return algebraic_connectivity(graph.subgraph(honest))


def gossip_limit(honest: Graph, b: int) -> float:
    """2b / mu_2 of the honest graph, b Byzantine neighbours at each honest peer: robust gossip needs it below 1.

    inf when the honest graph is not connected and b > 0 (or b = 0, where not even plain gossip reaches the average).
    Source: Gaucher+ 2025 (2410.10418), impossibility at 2b >= mu_2; specs/byzantine.md section 2.7.
    """
    if b < 0:
        raise ValueError(f"the number of Byzantine neighbours must be at least 0, got {b}")
    mu = algebraic_connectivity(honest)
    return 2.0 * b / mu if mu > 0.0 else float("inf")
