"""Weights & Biases as a mirror of the measurements, in a thread of its own.

Notable choices
- Starting W&B takes about 1.2 s and a row about 0.3 ms (wandb 0.31 on a 2-core machine), so both happen beside the run.
- Offline unless credentials are configured (`wandb login`, WANDB_API_KEY); WANDB_MODE, if set, decides. Nothing is
  printed by it. A server out of reach means offline too. A failure is said once, in one line, and the run goes on.
- Files go to <run>/wandb on local runs, else to a temporary folder (upload with `wandb sync`).
"""

from __future__ import annotations

import os
import queue
import sys
import tempfile
import threading
from collections.abc import Mapping
from typing import Any

from raysys.runtime.record import Record
from raysys.runtime.storage import Storage

PATIENCE = 30.0
"""Seconds that the end of a run waits for W&B."""
REACH_WITHIN = 12.0
"""Seconds that its server has to answer before the run is logged offline."""
Row = tuple[str, int, dict[str, float]]


class Tracker:
    """Feeds one W&B run. Construction is free: W&B starts with the first row."""

    def __init__(self, storage: Storage, name: str, record: Record, config: dict[str, Any]) -> None:
        self._storage, self._name, self._record, self._config = storage, name, record, config
        self._rows: queue.SimpleQueue[Row | list[dict[str, Any]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def log(self, stage: str, round: int, scalars: Mapping[str, Any]) -> None:
        """Queue a row; never waits, never raises."""
        if os.environ.get("WANDB_MODE") == "disabled":
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._mirror, name="wandb", daemon=True)
            self._thread.start()
        numbers = {key: float(value) for key, value in scalars.items() if isinstance(value, int | float)}
        self._rows.put((stage, round, numbers))

    def close(self, table: list[dict[str, Any]]) -> None:
        """Send the final table, end the W&B run, and wait for it (a while)."""
        if self._thread is not None:
            self._rows.put(table)
            self._rows.put(None)
            self._thread.join(PATIENCE)
            if self._thread.is_alive():
                self._say(f"it did not finish within {PATIENCE:.0f} s")

    def _mirror(self) -> None:
        try:
            self._feed(self._start())
        except Exception as error:  # noqa: BLE001 (whatever goes wrong in the mirror, it is said and the run goes on)
            self._say(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")

    def _start(self) -> Any:
        import wandb

        folder = (
            str(self._storage.local) if self._storage.local is not None else tempfile.mkdtemp(prefix="raysys-wandb-")
        )
        quiet = wandb.Settings(
            silent=True, quiet=True, console="off", init_timeout=REACH_WITHIN, disable_git=True, disable_code=True,
            x_disable_stats=True, x_save_requirements=False,
        )  # fmt: skip
        wandb.setup(quiet)
        about: dict[str, Any] = {
            "project": os.environ.get("WANDB_PROJECT", "raysys"), "name": self._name, "group": self._record.system,
            "job_type": self._record.command, "config": self._config, "dir": folder, "settings": quiet,
            "reinit": "create_new",
        }  # fmt: skip
        mode: Any = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False, verify=False) else "offline")
        if mode == "online":
            try:
                return wandb.init(**about, mode="online")
            except wandb.errors.CommError:
                self._warn("Weights & Biases cannot be reached; this run is logged offline (later: wandb sync)")
                mode = "offline"
        return wandb.init(**about, mode=mode)

    def _feed(self, run: Any) -> None:
        import wandb

        run.define_metric("*", step_metric="round")
        while (item := self._rows.get()) is not None:
            if isinstance(item, list):
                columns = list(dict.fromkeys(key for row in item for key in row))
                if columns:
                    run.log({"table": wandb.Table(columns=columns, data=[[r.get(c) for c in columns] for r in item])})
            else:
                stage, round, numbers = item
                run.log({"round": round, **{f"{stage}/{key}": value for key, value in numbers.items()}})
        run.finish()

    def _say(self, why: str) -> None:
        self._warn(f"Weights & Biases is off for this run ({why}); metrics.jsonl has everything")

    @staticmethod
    def _warn(sentence: str) -> None:
        print(f"warning: {sentence}", file=sys.stderr, flush=True)
