"""The loop over training steps, as it runs in a worker process or in the caller's own."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from raysys.runtime.checkpoint import read_state, write_state
from raysys.runtime.exact import Engine, Exact, Peers, State
from raysys.runtime.sentences import UserError
from raysys.runtime.storage import Storage

if TYPE_CHECKING:
    from raysys.runtime.train import Learner, TrainConfig

PULSE_S = 0.5
Tell = Callable[[str, int, dict[str, Any]], None]
"""How the first worker tells the controller: what ("ready", "done", "row", "saved"), after or at which step, details."""


class LearnerError(RuntimeError):
    """The learner raised; the message holds the traceback of its process. It is not tried again."""


class WorkersLost(Exception):
    """Workers or their machines died."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint to go on from: steps done, its file and the file's SHA-256."""

    step: int
    file: str
    digest: str


@dataclass(frozen=True)
class Task:
    """What a worker is to do; small and picklable. Checkpoints are files of `storage`, named by `file`."""

    make: Callable[[str], Learner]
    config: TrainConfig
    log_every: int = 10
    storage: Storage | None = None
    prefix: str = ""
    resume: Saved | None = None

    @property
    def scratch(self) -> str:
        """A folder of the storage that Ray Train may use while the task runs."""
        return f"{self.prefix.rpartition('/')[0]}/ray"

    def file(self, step: int) -> str:
        return f"{self.prefix}/round-{step:09d}/state.safetensors"


def train_here(task: Task, device: str, peers: Peers, tell: Tell) -> State:
    """Make the steps that are left. Every worker calls it; the first one writes and tells.

    Returns the last state if the task has no storage; otherwise it is in the last checkpoint, and nothing is returned.

    Raises:
        UserError: the blocks of a step cannot be shared out evenly.
        FloatingPointError: a loss is not finite.
        RuntimeError: workers that should hold the same numbers do not.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, int(task.config.cpus_per_worker)))
    try:
        with torch.random.fork_rng(devices=[device] if device != "cpu" else []):
            return _train(task, device, peers, tell if peers.rank == 0 else _silent)
    finally:
        torch.set_num_threads(threads)


def _train(task: Task, device: str, peers: Peers, tell: Tell) -> State:
    learner, start, state = task.make(device), 0, State()
    if learner.blocks % peers.count:
        raise UserError(
            f"train.workers: got {peers.count}; a step has {learner.blocks} blocks, so expected a divisor of {learner.blocks}"
        )
    if task.resume is not None:
        assert task.storage is not None
        start = task.resume.step
        state, _ = read_state(task.storage, task.resume.file, task.resume.digest)
    engine = _engine(learner, device, task.config, peers, state)
    _agree(engine.state(), peers, device, "before the first step; make() must build the same module in every process")
    tell("ready", start, {})
    told = time.monotonic()
    for step in range(start, learner.steps):
        learner.before(step)
        last = step + 1 == learner.steps
        due = last or (step + 1) % task.log_every == 0
        loss, metrics = engine.step(step, due)
        if due:
            tell("row", step, {"loss": loss, "learning_rate": learner.learning_rate(step), **metrics})
        if last or (step + 1) % task.config.checkpoint_every == 0:
            _save(task, engine, step + 1, last, peers, device, tell)
        elif time.monotonic() - told > PULSE_S:
            tell("done", step + 1, {"loss": loss})
            told = time.monotonic()
    if start >= learner.steps:
        _save(task, engine, start, True, peers, device, tell)
    return engine.state() if task.storage is None else State()


def _engine(learner: Learner, device: str, config: TrainConfig, peers: Peers, state: State) -> Engine:
    if config.deepspeed == "off":
        return Exact(learner, device, config, peers, state)
    from raysys.runtime.zero import Zero  # DeepSpeed is an extra

    return Zero(learner, device, config, peers, state)


def _save(task: Task, engine: Engine, step: int, last: bool, peers: Peers, device: str, tell: Tell) -> None:
    if task.storage is None:
        return
    state = engine.state()
    _agree(
        state,
        peers,
        device,
        f"after step {step}; loss() may change no buffer, before() must change it alike everywhere",
    )
    if peers.rank == 0:
        digest = write_state(task.storage, task.file(step), state)
        tell("saved", step, {"file": task.file(step), "digest": digest, "last": last})


def _agree(state: State, peers: Peers, device: str, when: str) -> None:
    """Raise if the workers do not all hold the same bits."""
    if peers.count == 1:
        return
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(name.encode())
        digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    mine = torch.tensor(int.from_bytes(digest.digest()[:7], "little"), device=device)
    if len({int(theirs) for theirs in peers.gather(mine)}) > 1:
        raise RuntimeError(f"the workers do not hold the same parameters and buffers {when}")


def _silent(kind: str, step: int, details: dict[str, Any]) -> None:
    """Workers but the first tell nothing."""
