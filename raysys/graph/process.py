"""Graphs that change from round to round.

A graph process is a function (round, rng) -> Graph; the caller passes the generator of that round, so that a replay
draws the same graphs.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from raysys.graph.graph import Graph
from raysys.graph.topologies import erdos_renyi

GraphProcess = Callable[[int, np.random.Generator], Graph]


def fixed(graph: Graph) -> GraphProcess:
    """The same graph every round."""
    return lambda round, rng: graph


def resampled_erdos_renyi(n: int, p: float) -> GraphProcess:
    """A fresh G(n, p) every round: one may be disconnected, the union over rounds is what must connect."""
    return lambda round, rng: erdos_renyi(n, p, rng, connected=False)
