"""Byzantine nodes. They exist in simulation only: they read the honest updates of the round before they answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from actors.client import joined, slices
from actors.host import Host, State
from actors.message import Message

I64 = NDArray[np.int64]
F32 = NDArray[np.float32]
Edges = dict[tuple[int, int], F32]


class AdversaryBlock(Protocol):
    """The colluding Byzantine nodes of a run with a server."""

    def corrupt(self, round: int, senders: I64, honest: F32) -> tuple[I64, F32]:
        """Ids (f,) and messages (f, d), after seeing the honest rows (h, d) of `senders`."""

    def receive(self, round: int, model: F32) -> None:
        """Take the new model (d,)."""

    def state_dict(self) -> State: ...

    def load_state_dict(self, state: State) -> None: ...


class Adversary(Host[AdversaryBlock]):
    """The host of all Byzantine nodes of a run with a server: one block, because they collude."""

    def corrupt(self, round: int, cuts: Sequence[int], *honest: Message) -> Message | tuple[Message, ...]:
        """Messages in the shape of the clients', one per shard."""
        (block,) = self.blocks.values()
        senders, rows = joined(honest, len(cuts) - 1)
        ids, crafted = block.corrupt(round, senders, rows)
        return slices(round, ids, crafted, cuts)

    def receive(self, round: int, *parts: F32) -> None:
        """The new model, in column order of the server's shards."""
        (block,) = self.blocks.values()
        block.receive(round, parts[0] if len(parts) == 1 else np.concatenate(parts))


class PeerAdversaryBlock(Protocol):
    """The colluding Byzantine peers of a run without a server."""

    def corrupt(self, round: int, ids: I64, models: F32) -> Edges:
        """(sender, receiver) -> vector (d,), after seeing the honest models (h, d) of peers `ids`."""

    def state_dict(self) -> State: ...

    def load_state_dict(self, state: State) -> None: ...


class PeerAdversary(Host[PeerAdversaryBlock]):
    """The host of all Byzantine peers: one block, because they collude; every edge may carry another lie."""

    def corrupt(self, round: int, *honest: Message) -> tuple[int, Edges]:
        """The round and what is told on each edge."""
        (block,) = self.blocks.values()
        ids, models = joined(honest, 1)
        return round, block.corrupt(round, ids, models)
