"""A process that holds many virtual nodes, in blocks that are stepped together.

Notable choices
- A process per node would cost 0.3 GB and a second of start-up each; a host holds as many as memory allows.
- Plain classes: `ray.remote` is applied by the handles in actors/group.py, so a role can be tested without Ray.
- State is what a barrier saves: every block's state_dict plus the host's own counters, all named arrays.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from actors.message import BadMessage, Message, Traffic

State = dict[str, NDArray]


class Learner(Protocol):
    """What a role needs of a block of nodes, besides its own methods."""

    def state_dict(self) -> State: ...

    def load_state_dict(self, state: State) -> None: ...


B = TypeVar("B", bound=Learner)


class Host(Generic[B]):
    """Blocks of nodes by name; `make` builds one block from its node ids and knows nothing of Ray."""

    def __init__(
        self, make: Callable[[NDArray[np.int64]], B], blocks: Mapping[str, NDArray[np.int64]], links: int
    ) -> None:
        torch.set_num_threads(1)
        self.make, self.ids, self.links = make, dict(blocks), links
        self.restart()

    def restart(self) -> None:
        """Back to before the first round."""
        self.blocks: dict[str, B] = {name: self.make(ids) for name, ids in self.ids.items()}
        self.traffic = Traffic.of(self.links)
        self.refused = 0

    def where(self) -> dict[str, object]:
        """Process and machine, answered only when everything asked before is done."""
        return {"pid": os.getpid(), "machine": socket.gethostname(), "blocks": sorted(self.blocks)}

    def usable(self, message: Message, round: int, width: int) -> bool:
        """Whether a received message may be used; a refusal is counted and said in the host's log."""
        try:
            message.check(round, width, self.links)
        except BadMessage as reason:
            self.refused += 1
            print(f"refused a message: {reason}", flush=True)
            return False
        return True

    def counters(self) -> dict[str, int]:
        """Totals over this host's links."""
        return {
            "messages": int(self.traffic.messages.sum()),
            "bytes": int(self.traffic.bytes.sum()),
            "refused": self.refused,
        }

    def link_counts(self) -> Traffic:
        """Messages and bytes of each link that ends here."""
        return self.traffic

    def state(self) -> dict[str, State]:
        """One state per block; the first also carries the host's counters."""
        states = {name: dict(block.state_dict()) for name, block in self.blocks.items()}
        first = states[min(states)]
        first["host.messages"], first["host.bytes"] = self.traffic.messages, self.traffic.bytes
        first["host.refused"] = np.array(self.refused)
        return states

    def load(self, states: Mapping[str, State]) -> None:
        """Back to the barrier that `states` were taken at. They may come from another layout of hosts."""
        self.restart()
        for name, block in self.blocks.items():
            state = dict(states[name])
            if "host.messages" in state:
                self.traffic.messages += state.pop("host.messages")
                self.traffic.bytes += state.pop("host.bytes")
                self.refused += int(state.pop("host.refused"))
            block.load_state_dict(state)
