"""What nodes send each other.

Shapes: k nodes of the sending host, d_s columns of one shard (d if there is one).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


class BadMessage(ValueError):
    """A message that must not be used; the text says why."""


@dataclass(frozen=True)
class Message:
    """Vectors of several nodes for one round: row i of `rows` (k, d_s) is from node `ids[i]`, for `receiver`.

    Arrays, not tensors: Ray maps them from shared memory without a copy.
    """

    round: int
    ids: NDArray[np.int64]
    rows: NDArray[np.float32]

    def check(self, round: int, width: int, nodes: int) -> None:
        """Refuse a message of another round, shape or type, or from nodes that do not exist or speak twice.

        Non-finite values pass: which rows are poisoned is for the rule to judge and count.

        Raises:
            BadMessage: with the field, its value and what was expected.
        """
        if self.round != round:
            raise BadMessage(f"round {self.round} arrived in round {round}")
        if self.ids.dtype != np.int64 or self.ids.ndim != 1:
            raise BadMessage(f"sender ids are {self.ids.dtype} of {self.ids.ndim} dimensions, expected int64 of 1")
        if self.rows.dtype != np.float32 or self.rows.shape != (len(self.ids), width):
            raise BadMessage(f"rows are {self.rows.dtype} {self.rows.shape}, expected float32 {(len(self.ids), width)}")
        if len(self.ids) and (self.ids.min() < 0 or self.ids.max() >= nodes):
            raise BadMessage(f"sender {int(self.ids.max())} is not one of the {nodes} nodes")
        if len(np.unique(self.ids)) != len(self.ids):
            raise BadMessage("a sender appears twice")


@dataclass
class Traffic:
    """Messages and bytes per link, counted by the receiver: entry i is the link from node i (or to node i, downlink)."""

    messages: NDArray[np.int64]
    bytes: NDArray[np.int64]

    @classmethod
    def of(cls, links: int) -> Traffic:
        return cls(np.zeros(links, np.int64), np.zeros(links, np.int64))

    def count(self, links: NDArray[np.int64], size: int) -> None:
        """One message of `size` bytes on each of `links` (indices, each at most once)."""
        self.messages[links] += 1
        self.bytes[links] += size
