"""A named unit of work inside a run: finished, to be continued from a barrier, or new."""

from __future__ import annotations

import re
from collections.abc import Mapping
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from raysys.runtime.checkpoint import Checkpoints

if TYPE_CHECKING:
    from raysys.runtime.run import Run


class Stage:
    """A unit of work inside a run. Made by `run.stage(name)`; any name will do."""

    def __init__(self, run: Run, name: str) -> None:
        self.run, self.name = run, name
        readable = re.sub(r"[^A-Za-z0-9_+=-]+", ".", name).strip(".")[:80]
        self.folder = f"stages/{readable}-{sha256(name.encode()).hexdigest()[:8]}"
        self._checkpoints: Checkpoints | None = None

    @property
    def result(self) -> dict[str, Any] | None:
        """What `finish` was given, in this process or before a resume; None while the stage is not finished."""
        return self.run.results.get(self.name)

    def finish(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """Record the stage's result (JSON values; numpy numbers and arrays are converted) and return it as recorded."""
        return self.run.record_result(self.name, result)

    def log(self, round: int, **scalars: Any) -> None:
        """Record measurements of a round. After a resume, the first one drops what an earlier process logged from there on."""
        self.run.metrics.log(self.name, round, scalars)

    def rewind(self, round: int) -> None:
        """Drop measurements at or after a round, which is about to be computed again."""
        self.run.metrics.rewind(self.name, round)

    @property
    def checkpoints(self) -> Checkpoints:
        """The barriers of this stage."""
        if self._checkpoints is None:
            owner = f"{self.run.record.id}/{self.name}"
            prefix = f"{self.folder}/checkpoints"
            self._checkpoints = Checkpoints(self.run.storage, prefix, owner, self.run.record_refusal, self.run.flush)
        return self._checkpoints
