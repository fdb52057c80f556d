"""What takes part in every round of a job and has state: groups of hosts, a server, or a plain object in this process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import ray
from numpy.typing import NDArray

State = dict[str, NDArray]


@dataclass
class Call:
    """A call under way: what it answers, and whether the answer is small enough for the controller to look at."""

    owner: Participant
    host: int
    refs: list[ray.ObjectRef]
    acknowledged: bool
    order: int
    """Position among all calls of the controller: a call depends on earlier ones only."""


class Participant(Protocol):
    """Something with state that takes part in every round: a group of hosts, a server, or a plain object."""

    def ready(self) -> None:
        """Wait until it can be used."""

    def taken(self) -> list[Call]:
        """Calls submitted since this was last asked."""

    def kill(self, host: int) -> None:
        """End a host that does not answer."""

    def ask(self) -> None:
        """Ask for signs of life, without waiting: all participants are asked before any is judged."""

    def repair(self) -> list[str]:
        """Replace what is dead or gave no sign of life; says what was replaced."""

    def snapshot(self) -> Iterator[tuple[str, State]]:
        """Named states, all of the same round."""

    def restore(self, states: Mapping[str, State] | None) -> None:
        """Back to these states, or to before the first round."""


@dataclass
class Local:
    """A participant in this process: an object with state_dict and load_state_dict."""

    name: str
    block: Any
    start: State = field(init=False)

    def __post_init__(self) -> None:
        self.start = {k: np.array(v, copy=True) for k, v in self.block.state_dict().items()}

    def ready(self) -> None:
        return

    def taken(self) -> list[Call]:
        return []

    def kill(self, host: int) -> None:
        raise RuntimeError(f"{self.name} runs in this process and cannot be replaced")

    def ask(self) -> None:
        return

    def repair(self) -> list[str]:
        return []

    def snapshot(self) -> Iterator[tuple[str, State]]:
        yield self.name, self.block.state_dict()

    def restore(self, states: Mapping[str, State] | None) -> None:
        self.block.load_state_dict(self.start if states is None else states[self.name])
