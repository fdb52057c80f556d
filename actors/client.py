"""Clients of a server: they train on their own data, send their updates and receive the model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from actors.host import Host, State
from actors.message import Message

I64 = NDArray[np.int64]
F32 = NDArray[np.float32]


class ClientBlock(Protocol):
    """A block of client nodes."""

    def train(self, round: int) -> tuple[I64, F32]:
        """Ids (k,) and updates (k, d) of the nodes that take part."""

    def receive(self, round: int, model: F32) -> None:
        """Take the new model (d,)."""

    def statistics(self, round: int) -> State:
        """What the server needs to evaluate."""

    def state_dict(self) -> State: ...

    def load_state_dict(self, state: State) -> None: ...


class Client(Host[ClientBlock]):
    """A host of clients."""

    def train(self, round: int, cuts: Sequence[int]) -> Message | tuple[Message, ...]:
        """This round's updates, one message for each shard of columns [cuts[s], cuts[s+1])."""
        sent = [block.train(round) for block in self.blocks.values()]
        ids = np.concatenate([i for i, _ in sent])
        rows = np.concatenate([r for _, r in sent])
        return slices(round, ids, rows, cuts)

    def receive(self, round: int, *parts: F32) -> None:
        """The new model, in column order of the server's shards."""
        model = parts[0] if len(parts) == 1 else np.concatenate(parts)
        for name, block in self.blocks.items():
            block.receive(round, model)
            self.traffic.count(self.ids[name], model.nbytes)

    def statistics(self, round: int) -> list[State]:
        """One entry per block."""
        return [block.statistics(round) for block in self.blocks.values()]


def slices(round: int, ids: I64, rows: F32, cuts: Sequence[int]) -> Message | tuple[Message, ...]:
    """One message per shard of columns; a single message, not a tuple, where there is one shard (Ray's num_returns)."""
    cut = tuple(Message(round, ids, np.ascontiguousarray(rows[:, a:b])) for a, b in pairwise(cuts))
    return cut if len(cut) > 1 else cut[0]


def joined(messages: Sequence[Message], shards: int) -> tuple[I64, F32]:
    """Ids (k,) and whole rows (k, d), in order of ids, from messages listed sender by sender, shards of one together."""
    ids = np.concatenate([m.ids for m in messages[::shards]])
    rows = [np.concatenate([m.rows for m in messages[i : i + shards]], 1) for i in range(0, len(messages), shards)]
    order = np.argsort(ids, kind="stable")
    return ids[order], np.concatenate(rows)[order]
