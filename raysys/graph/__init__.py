"""Topologies, graph processes, mixing matrices and spectral quantities."""

from raysys.graph.graph import Graph
from raysys.graph.mixing import MIXING, lazy, max_degree, metropolis_hastings, uniform
from raysys.graph.process import GraphProcess, fixed, resampled_erdos_renyi
from raysys.graph.spectral import (
    algebraic_connectivity,
    fiedler_vector,
    gossip_limit,
    honest_connectivity,
    laplacian,
    spectral_gap,
)
from raysys.graph.topologies import (
    GRAPHS,
    complete,
    erdos_renyi,
    exponential,
    make_graph,
    random_regular,
    ring,
    small_world,
    star,
    torus,
    two_cliques,
)

__all__ = [
    "GRAPHS",
    "MIXING",
    "Graph",
    "GraphProcess",
    "algebraic_connectivity",
    "complete",
    "erdos_renyi",
    "exponential",
    "fiedler_vector",
    "fixed",
    "gossip_limit",
    "honest_connectivity",
    "laplacian",
    "lazy",
    "make_graph",
    "max_degree",
    "metropolis_hastings",
    "random_regular",
    "resampled_erdos_renyi",
    "ring",
    "small_world",
    "spectral_gap",
    "star",
    "torus",
    "two_cliques",
    "uniform",
]
