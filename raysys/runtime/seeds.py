"""Random numbers that depend on what they are for and on nothing else.

Notable choices
- One stream per purpose, so changing the partition does not change the batches, and so on.
- Stateless: a number is a hash of (seed, stream, node, round, index). There is nothing to checkpoint, and neither the
  layout over hosts, nor the order of arrival, nor a replay after a failure can change a result.
- The hash is SplitMix64's finaliser (Steele, Lea & Flood, OOPSLA 2014) applied to each field in turn, vectorised over
  nodes: 10,000 nodes draw their batches in a few milliseconds. It is not for cryptography.
"""

from __future__ import annotations

from enum import IntEnum
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

U64 = NDArray[np.uint64]


class Stream(IntEnum):
    """What a random number is for."""

    PARTITION = 1
    INIT = 2
    BATCH = 3
    GRAPH = 4
    ATTACK = 5
    PARTICIPATION = 6
    SHUFFLE = 7
    ROLLOUT = 8


def _mix(x: U64) -> U64:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _mix_one(x: int) -> int:
    """The same for one word; plain integers are ten times faster than arrays of one."""
    mask = 0xFFFFFFFFFFFFFFFF
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


@lru_cache(maxsize=64)
def _positions(count: int) -> U64:
    return _mix(np.arange(count, dtype=np.uint64))[None, :]


class Seeds:
    """The random streams of one experiment."""

    def __init__(self, seed: int) -> None:
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed must lie in [0, 2^63), got {seed}")
        self.seed = seed

    def bits(self, stream: Stream, nodes: NDArray[np.integer] | int, round: int, count: int) -> U64:
        """`count` 64-bit words for each node: (k, count) for k nodes. `round` may be -1 for 'before the first round'."""
        ids: U64 = np.atleast_1d(np.asarray(nodes, dtype=np.int64)).astype(np.uint64)
        word = _mix_one(_mix_one(_mix_one(self.seed) ^ int(stream)) ^ (round + 1))
        per_node = _mix(ids ^ np.uint64(word))
        return _mix(per_node[:, None] ^ _positions(count))

    def uniform(self, stream: Stream, nodes: NDArray[np.integer] | int, round: int, count: int) -> NDArray[np.float64]:
        """Uniform numbers in [0, 1): (k, count)."""
        return (self.bits(stream, nodes, round, count) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def integers(
        self, stream: Stream, nodes: NDArray[np.integer] | int, round: int, count: int, below: NDArray[np.integer] | int
    ) -> NDArray[np.int64]:
        """Uniform integers in [0, below), `below` one number or one per node: (k, count)."""
        below = np.atleast_1d(np.asarray(below, dtype=np.int64))[:, None]
        return np.minimum((self.uniform(stream, nodes, round, count) * below).astype(np.int64), below - 1)

    def rng(self, stream: Stream, node: int = 0, round: int = -1) -> np.random.Generator:
        """A numpy generator for what needs a distribution or a permutation."""
        return np.random.Generator(np.random.Philox(key=self.bits(stream, node, round, 2)[0]))

    def generator(self, stream: Stream, node: int = 0, round: int = -1) -> torch.Generator:
        """A torch generator (CPU) for initialisation and sampling inside models."""
        return torch.Generator().manual_seed(int(self.bits(stream, node, round, 1)[0, 0] >> np.uint64(1)))
