"""The loop of a round-based job: resume, barriers, recovery, progress, and measurements that arrive late.

    for t in Rounds(stage, config.rounds, participants, ...):
        ...submit the round's calls...        # nothing in the body waits
        if rounds.due(t): rounds.log(t, server.evaluate(t, ...))

Notable choices
- The body only submits. All waiting is done between rounds, in one place, so a failure surfaces there and can be repaired
  there: the loop goes back to the last barrier and yields that round again. The body never knows.
- A few rounds may be under way at once (`AHEAD`); at a barrier everything has arrived.
- A barrier is the state of all participants after the same round. Since every random number is a function of
  (seed, node, round), a replay ends with the same bits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import ray
from ray.exceptions import (
    GetTimeoutError,
    NodeDiedError,
    ObjectLostError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from raysys.runtime.checkpoint import read_state, write_state
from raysys.runtime.participants import Call, Participant, State
from raysys.runtime.progress import Progress
from raysys.runtime.run import Stage

AHEAD = 2
LOSSES = (RayActorError, WorkerCrashedError, ObjectLostError, NodeDiedError)
PATIENCE = 3
T = TypeVar("T")


class Lost(Exception):
    """A host died or does not answer; the round must be replayed."""


class Rounds:
    """Iterate over the rounds of a stage that are still to do.

    Args:
        stage: where measurements and barriers go; a resumed stage continues at its last barrier.
        total: rounds in all.
        participants: everything whose state belongs to the run.
        snapshot_every: rounds between barriers.
        log_every: rounds between measurements (`due`).
        timeout_s: how long any answer may be owed.
        progress: advanced as rounds complete; it may be shared by several stages.
    """

    def __init__(
        self,
        stage: Stage,
        total: int,
        participants: Sequence[Participant],
        *,
        snapshot_every: int,
        log_every: int,
        timeout_s: float = 300.0,
        progress: Progress | None = None,
    ) -> None:
        self.stage, self.total, self.participants = stage, total, list(participants)
        self.snapshot_every, self.log_every, self.timeout_s = snapshot_every, log_every, timeout_s
        self.progress = progress
        self.last: dict[str, float] = {}
        self._under_way: list[tuple[int, list[Call]]] = []
        self._measured: list[tuple[int, Any]] = []
        self._advanced = 0
        self._losses = 0

    def due(self, t: int) -> bool:
        """Whether round t is measured: every `log_every` rounds and the last."""
        return (t + 1) % self.log_every == 0 or t == self.total - 1

    def log(self, t: int, values: Mapping[str, float] | ray.ObjectRef) -> None:
        """Record measurements of round t; a reference is looked up when the round has arrived."""
        self._measured.append((t, values))

    def __iter__(self) -> Iterator[int]:
        t = self._start(replace=False)
        while t < self.total:
            yield t
            self._under_way.append((t, [call for p in self.participants for call in p.taken()]))
            end = (t + 1) % self.snapshot_every == 0 or t == self.total - 1
            try:
                self._settle(0 if end else AHEAD)
                if end:
                    self._save(t + 1)
                    self._losses = 0
            except Lost as loss:
                self._count(loss, t)
                t = self._start(replace=True)
                continue
            t += 1
            self._advance(t)

    def after(self, question: Callable[[], T]) -> T:
        """The answer to a question that is asked of hosts after the last round: a host that is lost before it has answered
        is replaced, everyone returns to the last barrier, and the question is asked again."""
        while True:
            try:
                with losses():
                    return question()
            except Lost as loss:
                self._count(loss, self.total)
                self._start(replace=True)

    def _count(self, loss: Lost, t: int) -> None:
        self._losses += 1
        self.stage.run.event("host lost", stage=self.stage.name, round=t, reason=str(loss), losses=self._losses)
        if self._losses > PATIENCE:
            raise RuntimeError(f"hosts were lost {self._losses} times after the same barrier: {loss}") from loss

    def _start(self, replace: bool) -> int:
        """Put everyone at the last barrier, after replacing what died; the round to go on with."""
        started = time.monotonic()
        while True:
            self._under_way.clear()
            self._measured.clear()
            try:
                with losses():
                    if not replace:
                        for p in self.participants:
                            p.ready()
                    if replace:
                        for p in self.participants:
                            p.ask()
                    replaced = [what for p in self.participants for what in p.repair()] if replace else []
                    for p in self.participants:
                        p.taken()
                    t = self._return_to_barrier()
            except Lost as loss:
                self._count(loss, -1)
                replace = True
                continue
            if replace:
                took = round(time.monotonic() - started, 3)
                self.stage.run.event("recovered", stage=self.stage.name, replaced=replaced, round=t, seconds=took)
            return t

    def _advance(self, done: int) -> None:
        if self.progress is not None and done > self._advanced:
            self.progress.advance(done - self._advanced)
            self._advanced = done

    def _settle(self, leave: int) -> None:
        """Wait for all rounds under way but the newest `leave`, then record what was measured in them."""
        while len(self._under_way) > leave:
            t, calls = self._under_way[0]
            self._wait(calls)
            ready = [(at, values) for at, values in self._measured if at <= t]
            self._measured = [(at, values) for at, values in self._measured if at > t]
            for at, values in ready:
                self.last = dict(self._get(values) if isinstance(values, ray.ObjectRef) else values)
                self.stage.log(at, **self.last)
            self._under_way.pop(0)

    def _wait(self, calls: list[Call]) -> None:
        acknowledgements = [ref for call in calls if call.acknowledged for ref in call.refs]
        if not acknowledgements:
            return
        ready, late = ray.wait(
            acknowledgements, num_returns=len(acknowledgements), timeout=self.timeout_s, fetch_local=False
        )
        if late:
            self._end_those_who_hang(calls)
        for ref in ready:
            self._get(ref)

    def _get(self, ref: ray.ObjectRef) -> Any:
        with losses():
            return ray.get(ref, timeout=self.timeout_s)

    def _end_those_who_hang(self, calls: list[Call]) -> None:
        """The first call in order of submission that is not done holds up all others: its host hangs."""
        for call in sorted(calls, key=lambda call: call.order):
            done, _ = ray.wait(call.refs, num_returns=len(call.refs), timeout=0, fetch_local=False)
            if len(done) < len(call.refs):
                call.owner.kill(call.host)
                raise Lost(f"a host owed an answer for more than {self.timeout_s:g} s and was ended")

    def _return_to_barrier(self) -> int:
        checkpoint = self.stage.checkpoints.latest()
        if checkpoint is None:
            for p in self.participants:
                p.restore(None)
            self.stage.rewind(0)
            return 0
        states: dict[str, State] = {}
        for file, digest in checkpoint.files.items():
            state, meta = read_state(self.stage.run.storage, file, digest)
            states[meta["name"]] = state
        for p in self.participants:
            p.restore(states)
        self.last = dict(checkpoint.meta["last"])
        self.stage.rewind(checkpoint.round)
        self._advance(checkpoint.round)
        return checkpoint.round

    def _save(self, t: int) -> None:
        """Commit the state of all participants before round t as a barrier."""
        folder = self.stage.checkpoints.folder(t)
        files: dict[str, str] = {}
        with losses():
            for p in self.participants:
                for name, state in p.snapshot():
                    file = f"{folder}/{name}.safetensors"
                    files[file] = write_state(self.stage.run.storage, file, state, {"name": name})
        self.stage.checkpoints.commit(t, files, {"last": self.last})


@contextmanager
def losses() -> Iterator[None]:
    """Turn whatever means that a host is gone, or silent for too long, into `Lost`."""
    try:
        yield
    except GetTimeoutError as error:
        raise Lost("a host gave no answer in time") from error
    except RayError as error:
        if not is_loss(error):
            raise
        raise Lost(str(error).splitlines()[0]) from error


def is_loss(error: BaseException) -> bool:
    """Whether an error of Ray means that a process, a machine or an object is gone, rather than a bug in the code it ran."""
    if isinstance(error, LOSSES):
        return True
    return isinstance(error, RayTaskError) and error.cause is not None and is_loss(error.cause)
