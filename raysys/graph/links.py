"""Who can hear whom in a round, for graphs that change: functions of (round, the round's generator).

Notable choices
- A family is a function (n, rng, options) -> Links; its `rng` is that of before the first round, and a draw takes
  numbers from the generator of its own round only. So any round can be drawn on its own, and a replay gives the same.
- Graphs that come out disconnected stay so: an isolated peer trains alone that round.

Shapes: links (n, n), [i, j] nonzero where receiver i hears sender j; bool (weights come from a rule) or float64 weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raysys.graph import topologies
from raysys.graph.finite_time import base_graph

Links = Callable[[int, np.random.Generator], NDArray[Any]]


@dataclass(frozen=True)
class Cycle:
    """The same rounds over and over."""

    rounds: Sequence[NDArray[Any]]

    def __call__(self, round: int, rng: np.random.Generator) -> NDArray[Any]:
        return self.rounds[round % len(self.rounds)]


def erdos_renyi(n: int, rng: np.random.Generator, *, p: float) -> Links:
    """Every edge anew each round with probability p. arXiv 2602.00451, section on topologies."""
    _probability("erdos_renyi", p)
    return lambda round, rng: topologies.erdos_renyi(n, p, rng, connected=False).adjacency


def random_regular(n: int, rng: np.random.Generator, *, degree: int = 4) -> Links:
    """A uniform connected graph of this degree each round: Epidemic Learning (de Vos+ 2023) with two-way exchanges."""
    topologies.random_regular(n, degree, np.random.default_rng(0))  # refuses what cannot be drawn, before round 0
    return lambda round, rng: topologies.random_regular(n, degree, rng).adjacency


def matching(n: int, rng: np.random.Generator, *, p: float | None = None) -> Links:
    """Pairs that meet. Without p a uniform perfect matching (with n odd one peer is left out).

    With p every pair meets with probability p; meetings happen in a uniformly random order and one whose ends are still
    free takes place, so that the matching is maximal among the meetings. ADF-LoRA (arXiv 2511.18291) states "random pair
    encounters with probability 0.1, symmetric pair averaging"; order and maximality are inferred.
    """
    if p is None:
        return lambda round, rng: _pairs(n, rng.permutation(n)[: n - n % 2].reshape(-1, 2))
    _probability("matching", p)
    first, second = np.triu_indices(n, 1)

    def draw(round: int, rng: np.random.Generator) -> NDArray[np.bool_]:
        meetings = np.flatnonzero(rng.random(len(first)) < p)
        free, met = np.ones(n, dtype=bool), []
        for pair in rng.permutation(meetings):
            i, j = first[pair], second[pair]
            if free[i] and free[j]:
                free[i] = free[j] = False
                met.append((i, j))
        return _pairs(n, np.array(met, dtype=np.int64).reshape(-1, 2))

    return draw


def one_peer_exponential(n: int, rng: np.random.Generator) -> Links:
    """Round t: peer i hears i - 2^(t mod ceil(log2 n)) and itself, with weights 1/2: a directed circulant.

    The product of log2(n) rounds is exactly the mean for n a power of two. Source: Ying+ 2021 (2110.13363), section 4.
    """
    if n < 2:
        raise ValueError(f"one_peer_exponential needs n >= 2 peers, got {n}")
    eye = np.eye(n)
    return Cycle([(eye + np.roll(eye, 2**k, axis=0)) / 2.0 for k in range((n - 1).bit_length())])


def finite_time(n: int, rng: np.random.Generator, *, k: int = 1) -> Links:
    """The rounds of the Base-(k+1) graph, over and over: see `base_graph`."""
    return Cycle(base_graph(n, k))


def waypoint(n: int, rng: np.random.Generator, *, radius: float, speed: float) -> Links:
    """Contacts at a distance of at most `radius` among peers that roam the unit square, `speed` a round.

    Every peer goes straight from one uniform point to the next, without pause, from a uniform start: Johnson & Maltz 1996;
    used for WAFL (Ochiai+ 2022). The trips come from one generator keyed before the first round, so that the positions
    of a round need no history.
    """
    if not radius > 0.0 or not 0.0 <= speed < math.inf:
        raise ValueError(f"waypoint needs radius > 0 and a finite speed >= 0, got radius={radius}, speed={speed}")
    key = int(rng.integers(2**63))

    def draw(round: int, rng: np.random.Generator) -> NDArray[np.bool_]:
        there = waypoint_positions(n, key, speed * max(round, 0))
        near = ((there[:, None] - there[None]) ** 2).sum(2) <= radius**2
        np.fill_diagonal(near, False)
        return near

    return draw


def waypoint_positions(n: int, key: int, distance: float) -> NDArray[np.float64]:
    """(n, 2) where peers are after having gone `distance` along their trips through uniform points of the unit square."""
    trips = 4
    while True:
        points = np.random.default_rng(key).random((trips, n, 2))  # more trips begin with the same ones
        steps = np.sqrt((np.diff(points, axis=0) ** 2).sum(2))
        gone = np.concatenate([np.zeros((1, n)), steps.cumsum(0)])
        if (gone[-1] > distance).all():
            break
        trips *= 2
    trip = (gone <= distance).sum(0) - 1
    peers = np.arange(n)
    share = (distance - gone[trip, peers]) / steps[trip, peers]
    return np.asarray(points[trip, peers] + share[:, None] * (points[trip + 1, peers] - points[trip, peers]))


FAMILIES: dict[str, Callable[..., Links]] = {
    "erdos_renyi": erdos_renyi,
    "random_regular": random_regular,
    "matching": matching,
    "one_peer_exponential": one_peer_exponential,
    "finite_time": finite_time,
    "waypoint": waypoint,
}


def _pairs(n: int, pairs: NDArray[np.int64]) -> NDArray[np.bool_]:
    links = np.zeros((n, n), dtype=bool)
    links[pairs[:, 0], pairs[:, 1]] = links[pairs[:, 1], pairs[:, 0]] = True
    return links


def _probability(name: str, p: float) -> None:
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"{name} needs a probability p in [0, 1], got {p}")
