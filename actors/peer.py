"""Peers without a server: they step on their own data and exchange models with their neighbours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from actors.adversary import Edges
from actors.client import joined
from actors.host import Host, State
from actors.message import Message

I64 = NDArray[np.int64]
F32 = NDArray[np.float32]


Measure = Callable[[Sequence[State]], Mapping[str, float]]


class PeerBlock(Protocol):
    """A block of peers."""

    def train(self, round: int) -> tuple[I64, F32]:
        """Ids (k,) and models (k, d) that are sent."""

    def exchange(self, round: int, ids: I64, models: F32, edges: Edges) -> Sequence[I64]:
        """Mix what the neighbours sent; whose messages each node received."""

    def statistics(self, round: int) -> State:
        """What the evaluation needs."""

    def outcomes(self) -> dict[str, int]:
        """Counts of the algorithm: exchanges skipped."""

    def state_dict(self) -> State: ...

    def load_state_dict(self, state: State) -> None: ...


class Peer(Host[PeerBlock]):
    """A host of peers."""

    def __init__(
        self, make: Callable[[I64], PeerBlock], blocks: Mapping[str, I64], links: int, measure: Measure
    ) -> None:
        super().__init__(make, blocks, links)
        self.measure = measure

    def train(self, round: int) -> Message:
        """The models that this host's peers send this round."""
        sent = [block.train(round) for block in self.blocks.values()]
        self.width = sent[0][1].shape[1]
        return Message(round, np.concatenate([i for i, _ in sent]), np.concatenate([r for _, r in sent]))

    def exchange(self, round: int, told: tuple[int, Edges], *honest: Message) -> None:
        """Mix the models of honest peers (all hosts' messages) and what Byzantine peers told on each edge."""
        width = self.width  # what this host's own peers sent this round: whatever differs is no message of it
        ids, models = joined([m for m in honest if self.usable(m, round, width)], 1)
        lies = self._well_formed(told, round, width)
        for block in self.blocks.values():
            for senders in block.exchange(round, ids, models, lies):
                self.traffic.count(senders, 4 * width)

    def statistics(self, round: int) -> list[State]:
        """One entry per block."""
        return [block.statistics(round) for block in self.blocks.values()]

    def outcomes(self) -> dict[str, int]:
        """What the algorithm itself counted on this host."""
        each = [block.outcomes() for block in self.blocks.values()]
        return {key: sum(o[key] for o in each) for key in each[0]}

    def evaluate(self, *parts: list[State]) -> Mapping[str, float]:
        """Measure from the statistics of all hosts."""
        return self.measure([state for host in parts for state in host])

    def _well_formed(self, told: tuple[int, Edges], round: int, width: int) -> Edges:
        sent_in, edges = told
        good = {e: v for e, v in edges.items() if sent_in == round and v.dtype == np.float32 and v.shape == (width,)}
        self.refused += len(edges) - len(good)
        return good
