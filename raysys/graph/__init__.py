"""Topologies, graph processes, mixing matrices and spectral quantities."""

from raysys.graph.contraction import (
    RunningContraction,
    contraction,
    contraction_closed_form,
    contraction_monte_carlo,
)
from raysys.graph.finite_time import base_graph
from raysys.graph.gossip import mix, push_sum, to_csr
from raysys.graph.graph import Graph
from raysys.graph.links import FAMILIES
from raysys.graph.mixing import MIXING, Matrix, laplacian_step, lazy, max_degree, metropolis_hastings, pairwise, uniform
from raysys.graph.probe import Probe
from raysys.graph.process import Process, make_process
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
    "FAMILIES",
    "GRAPHS",
    "MIXING",
    "Graph",
    "Matrix",
    "Probe",
    "Process",
    "RunningContraction",
    "algebraic_connectivity",
    "base_graph",
    "complete",
    "contraction",
    "contraction_closed_form",
    "contraction_monte_carlo",
    "erdos_renyi",
    "exponential",
    "fiedler_vector",
    "gossip_limit",
    "honest_connectivity",
    "laplacian",
    "laplacian_step",
    "lazy",
    "make_graph",
    "make_process",
    "max_degree",
    "metropolis_hastings",
    "mix",
    "pairwise",
    "push_sum",
    "random_regular",
    "ring",
    "small_world",
    "spectral_gap",
    "star",
    "to_csr",
    "torus",
    "two_cliques",
    "uniform",
]
