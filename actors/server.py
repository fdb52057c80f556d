"""The server, or one column shard of it: receives messages, aggregates them, holds the model and evaluates it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from actors.host import Host, State
from actors.message import Message

I64 = NDArray[np.int64]
F32 = NDArray[np.float32]


class ServerBlock(Protocol):
    """What aggregates: survey -> plan -> step, for its columns of the model."""

    model: F32

    def survey(self, round: int, ids: I64, rows: F32) -> Any:
        """Keep the rows (k, d_s) and return the little that a plan needs of them."""

    def plan(self, round: int, surveys: list[Any]) -> Any:
        """What to do, from the surveys of all shards in column order."""

    def step(self, round: int, plan: Any) -> F32:
        """Do it to these columns; the new model (d_s,)."""

    def outcomes(self) -> dict[str, int]:
        """Counts of the algorithm: rounds skipped, rows rejected."""

    def state_dict(self) -> State: ...

    def load_state_dict(self, state: State) -> None: ...


Evaluate = Callable[[F32, Sequence[State]], Mapping[str, float]]


class Server(Host[ServerBlock]):
    """One shard; a whole server is the only shard."""

    def __init__(
        self, make: Callable[[I64], ServerBlock], blocks: Mapping[str, I64], links: int, evaluate: Evaluate
    ) -> None:
        super().__init__(make, blocks, links)
        self.measure = evaluate

    @property
    def block(self) -> ServerBlock:
        (block,) = self.blocks.values()
        return block

    def aggregate(self, round: int, *messages: Message) -> F32:
        """A whole round of an unsharded server: messages of all hosts in, the new model (d,) out."""
        return self.step(round, self.plan(round, self.survey(round, *messages)))

    def survey(self, round: int, *messages: Message) -> Any:
        """Check and stack this shard's messages. One that is malformed is not used, and its links are not counted."""
        width = len(self.block.model)
        good = [m for m in messages if self.usable(m, round, width)]
        ids = np.concatenate([m.ids for m in good]) if good else np.empty(0, np.int64)
        rows = np.concatenate([m.rows for m in good]) if good else np.empty((0, width), np.float32)
        first = np.unique(ids, return_index=True)[1]
        if len(first) != len(ids):  # a node has one vote: the first message that names it counts
            self.refused += len(ids) - len(first)
            ids, rows = ids[first], rows[first]
        self.traffic.count(ids, 4 * width)
        return self.block.survey(round, ids, rows)

    def plan(self, round: int, *surveys: Any) -> Any:
        """From the surveys of all shards, in column order."""
        return self.block.plan(round, list(surveys))

    def step(self, round: int, plan: Any) -> F32:
        """Move this shard's columns; the new model (d_s,)."""
        return self.block.step(round, plan)

    def model(self) -> F32:
        """This shard's columns of the model (d_s,)."""
        return self.block.model

    def outcomes(self) -> dict[str, int]:
        """What the algorithm itself counted; every shard counts the same."""
        return self.block.outcomes()

    def evaluate(self, shards: int, *parts: Any) -> Mapping[str, float]:
        """Measure the model whose `shards` column parts come first, with the hosts' statistics that follow."""
        statistics = [state for host in parts[shards:] for state in host]
        return self.measure(np.concatenate(parts[:shards]), statistics)
