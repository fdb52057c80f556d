"""Generations under way, a step of each in turn, in one thread.

Notable choices
- Everything that computes is a Python generator whose every `next` is one step: a token, a scale, a frame of sound. The thread
  takes a step of each run in turn, so a short answer does not wait for a long one, and nobody's result depends on the turns.
- Runs that begin together and are alike (`key`) share their steps: rows of one batch. They are those that wait when a place falls
  free, so batches grow with the load and nobody waits for company.
- A row whose request is gone is dropped at the next step; a run without rows ends.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Generator, Hashable
from dataclasses import dataclass, field
from typing import Any

from serve.refusal import Refused

log = logging.getLogger("ray.serve")
Event = dict[str, Any]
Run = Generator[None, None, None]


@dataclass(eq=False)
class Ticket:
    """A request in the queue: what to do, and whom to tell. `tell` is called from the thread."""

    work: Any
    tell: Callable[[Event | Refused], None]
    gone: bool = field(default=False)
    """Set by whoever waited, when it waits no more."""


class Turns:
    """The queue, the runs, and the thread that computes them.

    Args:
        begin: tickets that are alike to the generator that serves them; it tells each of them its events and its end.
        key: what tickets must have in common to share a run; None for a run of its own.
        runs: runs at once at most: each holds a cache.
        rows: tickets of a run at most.
        prepare: called once in the thread, before anything else.
    """

    def __init__(
        self,
        begin: Callable[[list[Ticket]], Run],
        key: Callable[[Ticket], Hashable],
        runs: int,
        rows: int,
        prepare: Callable[[], None],
    ) -> None:
        self.begin, self.key, self.most_runs, self.most_rows, self.prepare = begin, key, runs, rows, prepare
        self._waiting: deque[Ticket] = deque()
        self._runs: deque[tuple[Run, list[Ticket]]] = deque()
        self._more = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name="turns", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def counts(self) -> tuple[int, int]:
        """Tickets that wait, and runs under way."""
        return len(self._waiting), len(self._runs)

    def enter(self, ticket: Ticket) -> None:
        """Queue a ticket; returns at once."""
        with self._more:
            self._waiting.append(ticket)
            self._more.notify()

    def close(self) -> None:
        """End the thread after the step that it is at."""
        with self._more:
            self._closed = True
            self._more.notify()
        self._thread.join()

    def _loop(self) -> None:
        self.prepare()
        while True:
            with self._more:
                self._more.wait_for(lambda: self._runs or self._waiting or self._closed)
                if self._closed:
                    return
                begun = self._admitted()
            for tickets in begun:
                self._runs.append((self.begin(tickets), tickets))
            for _ in range(len(self._runs)):
                run, tickets = self._runs[0]
                going = self._step(run, tickets)
                self._runs.popleft()
                if going:
                    self._runs.append((run, tickets))

    def _admitted(self) -> list[list[Ticket]]:
        """Tickets for the free places, first come first; those alike to them join."""
        begun: list[list[Ticket]] = []
        waiting = deque(ticket for ticket in self._waiting if not ticket.gone)
        while waiting and len(self._runs) + len(begun) < self.most_runs:
            first = waiting.popleft()
            tickets, key = [first], self.key(first)
            if key is not None:
                alike = [ticket for ticket in waiting if self.key(ticket) == key][: self.most_rows - 1]
                tickets += alike
                waiting = deque(ticket for ticket in waiting if ticket not in alike)
            begun.append(tickets)
        self._waiting = waiting
        return begun

    def _step(self, run: Run, tickets: list[Ticket]) -> bool:
        """Take a step; whether there is another one."""
        if all(ticket.gone for ticket in tickets):
            run.close()
            return False
        try:
            next(run)
        except StopIteration:
            return False
        except Exception as wrong:
            log.error("a generation failed", exc_info=wrong)
            for ticket in tickets:
                ticket.tell(Refused(500, "app: an unexpected error, which the log describes"))
            return False
        return True
