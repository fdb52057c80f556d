"""Mixing matrices: (n, n) float64, row i holds the weights peer i gives to what it receives.

Notable choices
- Symmetric and doubly stochastic (all but `uniform`), so plain gossip keeps the average exactly; `uniform` is
  row-stochastic only and says so.
- The diagonal is written as one minus the rest of its row, so that rows sum to one to the last bit or two.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from raysys.graph.graph import Graph
from raysys.graph.spectral import laplacian

Matrix = NDArray[np.float64]


def metropolis_hastings(graph: Graph) -> Matrix:
    """w_ij = 1 / (1 + max(deg_i, deg_j)) on edges, the rest on the diagonal: doubly stochastic.

    Source: Xiao & Boyd, Fast linear iterations for distributed averaging (2004), section 4.2.
    """
    degree = graph.degree
    return _closed(np.where(graph.adjacency, 1.0 / (1.0 + np.maximum.outer(degree, degree)), 0.0))


def max_degree(graph: Graph) -> Matrix:
    """w_ij = 1 / (1 + largest degree) on edges: I - L / (1 + max degree), doubly stochastic."""
    return _closed(graph.adjacency / (1.0 + graph.degree.max()))


def laplacian_step(graph: Graph) -> Matrix:
    """I - 2 L / (3 lambda_max(L)), doubly stochastic with spectrum in [1/3, 1]; a graph without edges gives I.

    Source: the rule of Dec-LoRA (Ghiasvand+ 2025); specs/tad_lora.md section 2.4.
    """
    largest = np.linalg.eigvalsh(laplacian(graph))[-1] if graph.adjacency.any() else 1.0
    return _closed(graph.adjacency.astype(np.float64) * (2.0 / (3.0 * largest)))


def pairwise(graph: Graph) -> Matrix:
    """Both ends of an edge take their mean, for graphs in which nobody has two neighbours. Boyd+ 2006, section II."""
    if (most := int(graph.degree.max())) > 1:
        raise ValueError(
            f"pairwise weights need graphs in which a peer has at most one neighbour, got a degree of {most}"
        )
    return _closed(graph.adjacency / 2.0)


def uniform(graph: Graph) -> Matrix:
    """Peer i averages itself and its neighbours: w_ij = 1 / (1 + deg_i).

    Row-stochastic only: on an irregular graph plain gossip then converges to a degree-weighted average.
    """
    return _closed(graph.adjacency / (1.0 + graph.degree[:, None]))


def lazy(matrix: Matrix, stay: float = 0.5) -> Matrix:
    """stay I + (1 - stay) W, 0 <= stay < 1: with stay = 1/2 every eigenvalue is non-negative."""
    if not 0.0 <= stay < 1.0:
        raise ValueError(f"the share a peer keeps must lie in [0, 1), got {stay}")
    return stay * np.eye(len(matrix)) + (1.0 - stay) * matrix


MIXING: dict[str, Callable[[Graph], Matrix]] = {
    "metropolis_hastings": metropolis_hastings,
    "max_degree": max_degree,
    "laplacian": laplacian_step,
    "lazy": lambda graph: lazy(metropolis_hastings(graph)),
    "pairwise": pairwise,
    "uniform": uniform,
}


def _closed(off_diagonal: Matrix) -> Matrix:
    matrix = np.asarray(off_diagonal, dtype=np.float64).copy()
    np.fill_diagonal(matrix, 0.0)
    np.fill_diagonal(matrix, 1.0 - matrix.sum(1))
    return matrix
