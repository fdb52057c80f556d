"""The controller's side of a stage in training: rows, checkpoints and progress, told by the first worker."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from raysys.runtime.checkpoint import CheckpointError, read_state
from raysys.runtime.exact import State
from raysys.runtime.progress import Progress
from raysys.runtime.stage import Stage
from raysys.runtime.steps import Saved, Task

if TYPE_CHECKING:
    from raysys.runtime.train import Learner, TrainConfig


class Ledger:
    """Logs each row once and commits each checkpoint after the rows before it."""

    def __init__(self, stage: Stage, progress: Progress | None) -> None:
        self.stage, self.progress = stage, progress
        self.losses = 0
        """How often workers were lost since the last commit."""
        self._advanced = 0

    def task(self, make: Callable[[str], Learner], config: TrainConfig, log_every: int) -> Task:
        """What is left to do, from the last checkpoint that verifies; later rows are dropped, to be logged again."""
        checkpoint, saved = self.stage.checkpoints.latest(), None
        if checkpoint is not None:
            ((file, digest),) = checkpoint.files.items()
            saved = Saved(checkpoint.round, file, digest)
        self.stage.rewind(saved.step if saved else 0)
        self._advance(saved.step if saved else 0)
        storage, checkpoints = self.stage.run.storage, self.stage.checkpoints
        return Task(make, config, log_every, storage, checkpoints.prefix, saved)

    def take(self, kind: str, step: int, details: dict[str, Any]) -> None:
        """Act on what the first worker tells (`steps.Tell`)."""
        if kind == "row":
            self.stage.log(step, **details)
            step += 1
        elif kind == "saved":
            meta = {"last": details["last"]}
            self.stage.checkpoints.commit(step, {details["file"]: details["digest"]}, meta)
            self.losses = 0
        self._advance(step)
        if self.progress is not None and "loss" in details:
            self.progress.note(f"loss {details['loss']:.4g}")

    def result(self) -> dict[str, Tensor] | None:
        """The module's trained state, or None while the last step has no checkpoint that verifies."""
        checkpoint = self.stage.checkpoints.latest()
        if checkpoint is None or not checkpoint.meta["last"]:
            return None
        ((file, digest),) = checkpoint.files.items()
        return module_part(read_state(self.stage.run.storage, file, digest)[0])

    def final(self) -> dict[str, Tensor]:
        """The module's trained state; CheckpointError if it has gone."""
        result = self.result()
        if result is None:
            raise CheckpointError(f"stage {self.stage.name!r} was trained, but its last checkpoint is damaged already")
        return result

    def _advance(self, done: int) -> None:
        if self.progress is not None and done > self._advanced:
            self.progress.advance(done - self._advanced)
            self._advanced = done


def module_part(state: State) -> dict[str, Tensor]:
    """The module's part of a training state: parameters and buffers by name, floats as float32."""
    own = {key.removeprefix("module/"): value for key, value in state.items() if key.startswith("module/")}
    return {name: value.float() if value.is_floating_point() else value for name, value in own.items()}
