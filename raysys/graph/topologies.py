"""The standard topologies, by function and by name.

Source of the closed forms in the docstrings (mu_2 is the algebraic connectivity): Fiedler 1973; de Abreu 2007, table 1.
"""

from __future__ import annotations

from collections.abc import Callable

import networkx as nx
import numpy as np

from raysys.aggregation.registry import parse_item
from raysys.graph.graph import Graph

ATTEMPTS = 200


def ring(n: int) -> Graph:
    """Cycle of n >= 3 peers; mu_2 = 2 (1 - cos(2 pi / n))."""
    _at_least("ring", "n", n, 3)
    return Graph.from_edges(n, [(i, (i + 1) % n) for i in range(n)])


def complete(n: int) -> Graph:
    """Everyone with everyone; mu_2 = n."""
    _at_least("complete", "n", n, 2)
    return Graph(~np.eye(n, dtype=bool))


def star(n: int) -> Graph:
    """Peer 0 with everyone else; mu_2 = 1 (n = 2: 2)."""
    _at_least("star", "n", n, 2)
    return Graph.from_edges(n, [(0, i) for i in range(1, n)])


def torus(rows: int, columns: int) -> Graph:
    """rows x columns grid with wrap-around, peer r * columns + c; a side of 2 has a single edge, of 1 none.

    With sides of at least 3, mu_2 = 2 (1 - cos(2 pi / max(rows, columns))).
    """
    _at_least("torus", "rows", rows, 1)
    _at_least("torus", "columns", columns, 1)
    _at_least("torus", "rows * columns", rows * columns, 2)
    across = [(r * columns + c, r * columns + (c + 1) % columns) for r in range(rows) for c in range(columns)]
    down = [(r * columns + c, (r + 1) % rows * columns + c) for r in range(rows) for c in range(columns)]
    return Graph.from_edges(rows * columns, [edge for edge in across + down if edge[0] != edge[1]])


def erdos_renyi(n: int, p: float, rng: np.random.Generator, connected: bool = True) -> Graph:
    """G(n, p). With `connected`, draws again until connected, ValueError after 200 draws (p well below log(n)/n)."""
    _at_least("erdos_renyi", "n", n, 2)
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"erdos_renyi needs an edge probability in [0, 1], got p={p}")

    def draw() -> Graph:
        upper = np.triu(rng.random((n, n)) < p, 1)
        return Graph(upper | upper.T)

    return _connected(draw, f"erdos_renyi(n={n}, p={p})", "a larger p") if connected else draw()


def exponential(n: int) -> Graph:
    """i with i +- 2^k mod n for all 2^k < n: degree about 2 log2(n), diameter about log2(n).

    Undirected form of the static exponential graph of Ying+ 2021 (2110.13363).
    """
    _at_least("exponential", "n", n, 2)
    hops = [2**k for k in range(n.bit_length()) if 2**k < n]
    return Graph.from_edges(n, [(i, (i + hop) % n) for i in range(n) for hop in hops])


def random_regular(n: int, degree: int, rng: np.random.Generator) -> Graph:
    """Uniform connected graph in which every peer has `degree` neighbours; n * degree must be even, 1 < degree < n."""
    _at_least("random_regular", "n", n, 3)
    if not 2 <= degree < n or n * degree % 2:
        raise ValueError(f"random_regular needs 2 <= degree < n and n * degree even, got n={n}, degree={degree}")

    def draw() -> Graph:
        return Graph.from_networkx(nx.random_regular_graph(degree, n, seed=int(rng.integers(2**31))))

    return _connected(draw, f"random_regular(n={n}, degree={degree})", "a larger degree")


def small_world(n: int, rng: np.random.Generator, degree: int = 4, rewire: float = 0.1) -> Graph:
    """Watts-Strogatz 1998: ring lattice of even `degree`, each edge rewired with probability `rewire`; connected."""
    if degree < 2 or degree % 2 or degree >= n:
        raise ValueError(f"small_world needs an even degree with 2 <= degree < n, got n={n}, degree={degree}")
    if not 0.0 <= rewire <= 1.0:
        raise ValueError(f"small_world needs a rewiring probability in [0, 1], got rewire={rewire}")

    def draw() -> Graph:
        return Graph.from_networkx(nx.watts_strogatz_graph(n, degree, rewire, seed=int(rng.integers(2**31))))

    return _connected(draw, f"small_world(n={n}, degree={degree}, rewire={rewire})", "a larger degree")


def two_cliques(size: int, matchings: int) -> Graph:
    """Two cliques of `size` peers joined by `matchings` disjoint perfect matchings: peers 0..size-1 and size..2 size-1.

    mu_2 = 2 matchings while 2 matchings <= size, with the Fiedler vector +1 on one clique and -1 on the other: the
    graph on which the limit 2b = mu_2 of robust gossip is met exactly.
    """
    _at_least("two_cliques", "size", size, 1)
    if not 1 <= matchings <= size:
        raise ValueError(f"two_cliques needs 1 <= matchings <= size, got size={size}, matchings={matchings}")
    inside = [(side + i, side + j) for side in (0, size) for i in range(size) for j in range(i)]
    across = [(i, size + (i + shift) % size) for i in range(size) for shift in range(matchings)]
    return Graph.from_edges(2 * size, inside + across)


def make_graph(spec: str, n: int, rng: np.random.Generator) -> Graph:
    """The graph `spec` names on n peers: `name` or `name(key=value, ...)`.

    "ring", "complete", "star", "exponential", "torus" (as square as n allows; or torus(rows=R), R dividing n),
    "erdos_renyi(p=P)" (default p = min(1, 2 log(n) / n)), "random_regular(degree=K)" (default 4, or n - 1 when
    smaller), "small_world(degree=K, rewire=P)", "two_cliques(matchings=K)" (n even). ValueError for anything else.
    """
    name, given = parse_item(spec)
    if name not in GRAPHS:
        raise ValueError(f"unknown graph {name!r}, the graphs are {', '.join(sorted(GRAPHS))}")
    try:
        return GRAPHS[name](n, rng, **given)
    except TypeError as error:
        raise ValueError(f"graph {spec!r}: {str(error).replace('<lambda>', name)}") from error


def _torus(n: int, rng: np.random.Generator, *, rows: int | None = None) -> Graph:
    if rows is None:
        rows = max(r for r in range(1, int(n**0.5) + 1) if n % r == 0)
    if rows < 1 or n % rows:
        raise ValueError(f"a torus on n={n} peers needs a number of rows that divides n, got rows={rows}")
    return torus(rows, n // rows)


def _erdos_renyi(n: int, rng: np.random.Generator, *, p: float | None = None) -> Graph:
    return erdos_renyi(n, min(1.0, 2.0 * float(np.log(n)) / n) if p is None else p, rng)


def _random_regular(n: int, rng: np.random.Generator, *, degree: int | None = None) -> Graph:
    return random_regular(n, min(4, n - 1) if degree is None else degree, rng)


def _small_world(n: int, rng: np.random.Generator, *, degree: int = 4, rewire: float = 0.1) -> Graph:
    return small_world(n, rng, degree, rewire)


def _two_cliques(n: int, rng: np.random.Generator, *, matchings: int = 1) -> Graph:
    if n % 2:
        raise ValueError(f"two_cliques needs an even number of peers, got n={n}")
    return two_cliques(n // 2, matchings)


GRAPHS: dict[str, Callable[..., Graph]] = {
    "ring": lambda n, rng: ring(n),
    "complete": lambda n, rng: complete(n),
    "star": lambda n, rng: star(n),
    "exponential": lambda n, rng: exponential(n),
    "torus": _torus,
    "erdos_renyi": _erdos_renyi,
    "random_regular": _random_regular,
    "small_world": _small_world,
    "two_cliques": _two_cliques,
}


def _at_least(graph: str, what: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{graph} needs {what} >= {least}, got {value}")


def _connected(draw: Callable[[], Graph], what: str, instead: str) -> Graph:
    for _ in range(ATTEMPTS):
        graph = draw()
        if graph.is_connected():
            return graph
    raise ValueError(f"{what} gave no connected graph in {ATTEMPTS} draws, it needs {instead}")
