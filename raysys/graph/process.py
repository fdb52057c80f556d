"""Mixing that changes from round to round: a name becomes a function (round, rng) -> mixing matrix.

Grammar: "links" or "links+dropout(p=P)", where links is
- a graph of `make_graph`, drawn once before the first round: "ring", "torus(rows=2)", "small_world(degree=4)", ...;
- a family of `links.FAMILIES`, drawn anew each round: "erdos_renyi(p=0.02)", "random_regular(degree=4)", "matching",
  "matching(p=0.1)", "one_peer_exponential", "finite_time(k=1)", "waypoint(radius=0.3, speed=0.1)";
- "static(erdos_renyi(p=0.4))": the connected graph of `make_graph` where the bare name is drawn anew.

Notable choices
- A draw uses the generator of its round only, and who is present takes no random number: rounds replay one by one, and
  runs with and without failures see the same graphs.
- An absent peer loses its edges, and weights follow from what is left: the matrix stays doubly stochastic (directed:
  column-stochastic), the absent peer's row and column are those of the identity.
- The two directions of an edge drop out together. A single lost direction would break the symmetry and move the mean.

Shapes: n peers, W (n, n) float64 with W[i, j] the weight that receiver i gives to sender j. Source: specs/tad_lora.md 2.4.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raysys.aggregation.registry import checked, parse_item, split
from raysys.graph.graph import Graph
from raysys.graph.links import FAMILIES, Cycle, Links
from raysys.graph.mixing import MIXING, Matrix
from raysys.graph.topologies import GRAPHS, make_graph

OWN_WEIGHTS = ("one_peer_exponential", "finite_time")
"""Families whose links come with weights."""


@dataclass(frozen=True)
class Process:
    """A mixing process; `make_process` builds it.

    name, options, weights: what it was made from. dropout: the probability that an edge vanishes for a round.
    """

    n: int
    name: str
    options: Mapping[str, Any]
    weights: str
    dropout: float
    links: Links

    @property
    def directed(self) -> bool:
        """False: `mixing` is symmetric and doubly stochastic. True: column-stochastic, for push-sum (see `gossip`)."""
        return self.name == "one_peer_exponential"

    @property
    def period(self) -> int | None:
        """After how many rounds it repeats, 1 for a fixed graph; None where rounds are random."""
        return len(self.links.rounds) if isinstance(self.links, Cycle) and not self.dropout else None

    def mixing(self, round: int, rng: np.random.Generator, present: NDArray[np.bool_] | None = None) -> Matrix:
        """W (n, n) of a round. rng: that round's generator. present: (n,) bool, False for peers that are lost."""
        links = self.links(round, rng)
        keep = np.ones((self.n, self.n), dtype=bool)
        if self.dropout:
            keep = np.triu(rng.random((self.n, self.n)) >= self.dropout, 1)
            keep |= keep.T
        if present is not None:
            keep &= np.outer(present, present)
        np.fill_diagonal(keep, True)
        if links.dtype == bool:
            return MIXING[self.weights](Graph(links & keep))
        weights = np.where(keep, links, 0.0)
        if self.directed:  # a sender splits its mass over those that still hear it
            return np.asarray(weights / weights.sum(0))
        np.fill_diagonal(weights, 0.0)
        np.fill_diagonal(weights, 1.0 - weights.sum(1))
        return weights


def make_process(spec: str, n: int, weights: str, rng: np.random.Generator) -> Process:
    """The process `spec` names on n peers, e.g. "ring", "erdos_renyi(p=0.02)", "ring+dropout(p=0.2)".

    Args:
        weights: the rule of MIXING that makes a matrix of an undirected graph. Families with weights of their own
            (OWN_WEIGHTS) take the default rule's name, "metropolis_hastings", and no other.
        rng: the generator of before the first round: static random graphs and the trips of peers come from it.

    ValueError, in one sentence, for anything else.
    """
    base, *suffixes = split(spec)
    dropout = 0.0
    if suffixes:
        name, options = parse_item(suffixes[0])
        dropout = options.get("p", -1.0)
        if len(suffixes) > 1 or name != "dropout" or set(options) != {"p"} or not _is_share(dropout):
            raise ValueError(f"after the first plus a graph process takes dropout(p=P) with P in [0, 1], got {spec!r}")
    links: Links
    if inner := _STATIC.match(base):
        name, options = "static", {"graph": inner[1]}
        links = Cycle([make_graph(inner[1], n, rng).adjacency])
    else:
        name, options = parse_item(base)
        if name in FAMILIES:
            links = _family(name, options, n, rng)
        elif name in GRAPHS:
            links = Cycle([make_graph(base, n, rng).adjacency])
        else:
            known = ", ".join(sorted({*FAMILIES, *GRAPHS}))
            raise ValueError(f"unknown graph process {name!r}, the processes are {known}, and static(GRAPH)")
    _check_weights(name, weights)
    return Process(n, name, options, weights, float(dropout), links)


_STATIC = re.compile(r"^\s*static\s*\((.*)\)\s*$", re.DOTALL)


def _family(name: str, options: dict[str, Any], n: int, rng: np.random.Generator) -> Links:
    family = partial(FAMILIES[name], n, rng)
    checked(name, family, options)  # type: ignore[arg-type]  # it reads the signature, which a partial has too
    needed = [key for key, p in inspect.signature(family).parameters.items() if p.default is inspect.Parameter.empty]
    if missing := [key for key in needed if key not in options]:
        raise ValueError(f"{name} needs {' and '.join(f'{key}=...' for key in missing)}")
    return family(**options)


def _check_weights(name: str, weights: str) -> None:
    allowed = [rule for rule in MIXING if rule != "uniform" and (rule != "pairwise" or name == "matching")]
    if name in OWN_WEIGHTS:
        allowed = ["metropolis_hastings"]
    if weights in allowed:
        return
    if weights == "uniform":
        why = "uniform weights are row-stochastic only and move the average"
    elif name in OWN_WEIGHTS:
        why = f"{name} has weights of its own and leaves this at the default"
    else:
        why = f"{weights!r} is no rule for {name}"
    raise ValueError(f"weights: {why}; allowed: {', '.join(allowed)}")


def _is_share(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0.0 <= value <= 1.0
