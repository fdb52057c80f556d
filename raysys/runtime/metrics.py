"""Where measurements go: metrics.jsonl in the run folder, and Weights & Biases beside it.

Notable choices
- metrics.jsonl is the record; W&B is a mirror that may fail without stopping the run (said once). It is offline unless
  you are logged in, is started by the first measurement, and writes into the run folder (local runs).
- A round that is computed again replaces the rows of its first time: explicitly by `rewind`, and, for rows of an earlier
  process, at the first row that a resumed stage logs.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from typing import Any

from raysys.runtime.config import Config
from raysys.runtime.progress import Progress
from raysys.runtime.record import Record
from raysys.runtime.storage import Log, Storage
from raysys.runtime.tracking import Tracker

__all__ = ["Metrics", "Progress", "plain"]
FLUSH_EVERY = 30.0
RESERVED = ("stage", "round", "t")


class Metrics:
    """The sink of one run."""

    def __init__(self, storage: Storage, name: str, record: Record, config: Config) -> None:
        self._log = Log(storage, "metrics.jsonl")
        self._furthest: dict[str, int] = {}
        self._stale: set[str] = set()
        self._flushed = time.time()
        self.earlier_times: list[float] = []
        for row in self.rows():
            self._furthest[row["stage"]] = max(self._furthest.get(row["stage"], -1), row["round"])
            self._stale.add(row["stage"])
            self.earlier_times.append(row["t"])
        wanted = bool(getattr(config, "wandb", False))
        self._tracker = Tracker(storage, name, record, config.model_dump(mode="json")) if wanted else None

    def rows(self, stage: str | None = None) -> list[dict[str, Any]]:
        """All rows so far, or those of one stage."""
        rows = [json.loads(line) for line in self._log.read()]
        return [row for row in rows if stage in (None, row["stage"])]

    def log(self, stage: str, round: int, scalars: Mapping[str, Any]) -> None:
        """Append a row; values are numbers, texts or lists of them (what is not finite is written as null)."""
        for name in RESERVED:
            if name in scalars:
                raise ValueError(f"a measurement cannot be named {name!r}: the row uses that name itself")
        if stage in self._stale:
            self.rewind(stage, round)
        row = {"stage": stage, "round": round, "t": math.floor(time.time() * 1000) / 1000, **plain(scalars)}
        self._log.append(json.dumps(row, allow_nan=False).encode())
        self._furthest[stage] = max(self._furthest.get(stage, -1), round)
        if time.time() - self._flushed > FLUSH_EVERY:
            self.flush()
        if self._tracker is not None:
            self._tracker.log(stage, round, scalars)

    def rewind(self, stage: str, round: int) -> None:
        """Drop the stage's rows at or after a round."""
        self._stale.discard(stage)
        if self._furthest.get(stage, -1) < round:
            return

        def before(line: bytes) -> bool:
            row = json.loads(line)
            return row["stage"] != stage or row["round"] < round

        self._log.keep(before)
        self._furthest[stage] = round - 1

    def abandon(self) -> None:
        """Stop without writing anything more: the run folder is about to be deleted."""
        self._log.close()
        if self._tracker is not None:
            self._tracker.close([])

    def flush(self) -> None:
        """Make what was logged durable."""
        self._log.flush()
        self._flushed = time.time()

    def close(self, table: list[dict[str, Any]]) -> None:
        """Write out everything; `table` also goes to the tracker."""
        self._log.close()
        if self._tracker is not None:
            self._tracker.close(table)


def plain(value: Any) -> Any:
    """JSON values that any reader takes: numpy and torch numbers converted, what is not finite as null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
