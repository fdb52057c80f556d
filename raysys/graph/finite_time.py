"""Base-(k+1) graphs: exact consensus after finitely many rounds for any number of peers n and any degree k.

Source: Takezawa, Sato, Bao, Niwa & Yamada, Beyond exponential graph (NeurIPS 2023, arXiv 2305.11420), Algorithms 1 to 3.

Notable choices
- Written from the paper's argument, and held by the test that the product of a period is the mean for every n and k.
- The exchanges among peers that idle in a round (line 10 of Algorithm 2) are left out: within a period they change nothing.

Shapes: n peers; a round is an (n, n) float64 symmetric, doubly stochastic matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from raysys.graph.mixing import Matrix

I64 = NDArray[np.int64]


def base_graph(n: int, k: int) -> list[Matrix]:
    """The rounds of one period of the Base-(k+1) graph, each peer with at most k neighbours (Algorithm 3).

    n = p q with q free of divisors up to k + 1: p simple graphs of q peers side by side, then q hyper-hypercubes of p
    peers across them; or one simple graph, where that is shorter. ValueError unless n >= 1 and k >= 1.
    """
    if n < 1 or k < 1:
        raise ValueError(f"a finite-time graph needs n >= 1 peers and k >= 1 neighbours, got n={n}, k={k}")
    rough = n
    for divisor in range(2, k + 2):
        while rough % divisor == 0:
            rough //= divisor
    peers = np.arange(n).reshape(n // rough, rough)
    simple = _simple(n, np.arange(n), k)
    split = [_beside(n, rounds) for rounds in zip(*(_simple(n, group, k) for group in peers), strict=True)]
    split += [_beside(n, rounds) for rounds in zip(*(_hypercube(n, group, k) for group in peers.T), strict=True)]
    return min(simple, split, key=len) or [np.eye(n)]


def _simple(n: int, peers: I64, k: int) -> list[Matrix]:
    """The simple Base-(k+1) graph on `peers` (Algorithm 2).

    The peers are cut into sets V_1, V_2, ... by the digits of their number in base k + 1. Each set first averages within
    itself. Then, set by set, one peer of each equal part of V_l meets everyone of the later sets, with weights that leave
    every part with the overall mean; and each part averages within itself.
    """
    sets: list[list[I64]] = []
    left, size = peers, (k + 1) ** (len(np.base_repr(len(peers), k + 1)) - 1)
    while size:
        parts = len(left) // size
        if parts:
            sets.append(list(left[: parts * size].reshape(parts, size)))
        left, size = left[parts * size :], size // (k + 1)
    groups = [np.concatenate(parts) for parts in sets]
    within = [_hypercube(n, group, k) for group in groups]
    if len(groups) == 1:
        return within[0]
    after = [[_hypercube(n, part, k) for part in parts] for parts in sets]
    first = len(within[0])
    rounds = [_beside(n, [own[t] for own in within if t < len(own)]) for t in range(first)]
    for t in range(1 + len(after[0][0])):
        active = []
        if t < len(groups) - 1:
            active.append(_meeting(n, sets[t], np.concatenate(groups[t + 1 :])))
        for later, parts in enumerate(after):
            active += [part[t - later - 1] for part in parts if 0 <= t - later - 1 < len(part)]
        rounds.append(_beside(n, active))
    return rounds


def _meeting(n: int, parts: Sequence[I64], rest: I64) -> Matrix:
    """Peer r of `rest` meets peer r of every part: it keeps the share of the rest in all, the parts get the remainder."""
    size = sum(len(part) for part in parts)
    weight = size / (size + len(rest)) / len(parts)
    matrix = np.eye(n)
    for part in parts:
        matrix[rest, part[: len(rest)]] = matrix[part[: len(rest)], rest] = weight
        matrix[part[: len(rest)], part[: len(rest)]] = 1.0 - weight
    matrix[rest, rest] = 1.0 - weight * len(parts)
    return matrix


def _hypercube(n: int, peers: I64, k: int) -> list[Matrix]:
    """The k-peer hyper-hypercube on `peers` (Algorithm 1): one round a digit, those that differ in it take their mean."""
    rounds, stride = [], 1
    for digit in _factors(len(peers), k + 1):
        groups = peers.reshape(-1, digit, stride).transpose(0, 2, 1).reshape(-1, digit)
        matrix = np.eye(n)
        for group in groups:
            matrix[np.ix_(group, group)] = 1.0 / digit
        rounds.append(matrix)
        stride *= digit
    return rounds


@cache
def _factors(n: int, largest: int) -> tuple[int, ...]:
    """n, which has no prime factor above `largest`, as a product of as few factors in 2..largest as possible."""
    if n == 1:
        return ()
    divisors = [f for f in range(2, min(n, largest) + 1) if n % f == 0]
    return min(((f, *_factors(n // f, largest)) for f in divisors), key=len)


def _beside(n: int, parts: Sequence[Matrix]) -> Matrix:
    """Matrices that act on disjoint sets of peers, as one."""
    return np.asarray(sum((part - np.eye(n) for part in parts), start=np.eye(n)))
