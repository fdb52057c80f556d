"""An undirected graph of peers.

Notable choices
- The adjacency matrix is the graph: boolean, symmetric, empty diagonal, read-only. Peers are 0..n-1.
- n stays in the thousands here (a peer is a learner), so a dense matrix beats a sparse one and every spectral
  quantity is one `eigvalsh` away.

Shapes: n peers, e edges.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import networkx as nx
import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Graph:
    """An undirected graph without loops.

    `adjacency`: (n, n) bool, symmetric, False on the diagonal. A ValueError names what is wrong with any other matrix.
    """

    adjacency: NDArray[np.bool_]

    def __post_init__(self) -> None:
        matrix = np.array(self.adjacency, dtype=bool)
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.size:
            raise ValueError(f"an adjacency matrix is square and not empty, got shape {matrix.shape}")
        if matrix.diagonal().any():
            raise ValueError(f"a peer is not its own neighbour, got a loop at {int(matrix.diagonal().argmax())}")
        if (matrix != matrix.T).any():
            i, j = np.argwhere(matrix != matrix.T)[0]
            raise ValueError(f"an adjacency matrix is symmetric, got the edge {i} -> {j} in one direction only")
        matrix.setflags(write=False)
        object.__setattr__(self, "adjacency", matrix)

    @classmethod
    def from_edges(cls, n: int, edges: Iterable[tuple[int, int]]) -> Graph:
        """The graph on 0..n-1 with these edges, (i, j) in any order; loops are refused."""
        matrix = np.zeros((n, n), dtype=bool)
        for i, j in edges:
            if not (0 <= i < n and 0 <= j < n):
                raise ValueError(f"edge ({i}, {j}) leaves the peers 0..{n - 1}")
            matrix[i, j] = matrix[j, i] = True
        return cls(matrix)

    @classmethod
    def from_networkx(cls, graph: nx.Graph) -> Graph:
        """Nodes in the order `graph.nodes` gives; direction and weights are dropped."""
        matrix = nx.to_numpy_array(graph, weight=None) > 0
        return cls(matrix | matrix.T)

    def to_networkx(self) -> nx.Graph:
        return nx.from_numpy_array(self.adjacency.astype(np.int8))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Graph) and bool(np.array_equal(self.adjacency, other.adjacency))

    def __hash__(self) -> int:
        return hash((self.n, self.adjacency.tobytes()))

    def __repr__(self) -> str:
        return f"Graph(n={self.n}, edges={self.edge_count})"

    @property
    def n(self) -> int:
        return int(self.adjacency.shape[0])

    @property
    def degree(self) -> NDArray[np.int64]:
        """(n,) number of neighbours of each peer."""
        return self.adjacency.sum(1).astype(np.int64)

    @property
    def edge_count(self) -> int:
        return int(self.adjacency.sum()) // 2

    def neighbours(self, i: int) -> NDArray[np.int64]:
        """The neighbours of peer i in ascending order."""
        return np.flatnonzero(self.adjacency[i])

    def edges(self) -> NDArray[np.int64]:
        """(e, 2) edges with i < j, in ascending order."""
        return np.argwhere(np.triu(self.adjacency))

    def subgraph(self, peers: Iterable[int]) -> Graph:
        """The graph induced on `peers`, renumbered in the order given."""
        index = np.asarray(list(peers), dtype=np.int64)
        return Graph(self.adjacency[np.ix_(index, index)])

    def is_connected(self) -> bool:
        seen = np.zeros(self.n, dtype=bool)
        frontier = np.zeros(self.n, dtype=bool)
        frontier[0] = True
        while frontier.any():
            seen |= frontier
            frontier = self.adjacency[frontier].any(0) & ~seen
        return bool(seen.all())

    def byzantine_neighbours(self, byzantine: Iterable[int]) -> NDArray[np.int64]:
        """(n,) how many of each peer's neighbours are in `byzantine`."""
        index = np.asarray(list(byzantine), dtype=np.int64)
        return self.adjacency[:, index].sum(1).astype(np.int64)
