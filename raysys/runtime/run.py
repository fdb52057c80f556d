"""The run folder: what a job was asked, what it measured, and how far it got.

    run.json  config.yaml        what was asked; config.yaml comes second and makes the folder a run
    metrics.jsonl                one row per logged round {"stage", "round", "t", ...}
    events.jsonl                 openings, failures, recoveries, refused checkpoints
    results.jsonl                one line per finished stage
    stages/<stage>/checkpoints/  barriers of the stages that can be continued
    figures/  report.html  summary.json

Notable choices
- A job is a sequence of stages (a training run, one cell of a matrix). A finished stage is skipped on resume, the one
  in progress continues from its last barrier, and since every random number is a function of (seed, node, round), the
  resumed run ends with the same bits.
- Cheap stages: finishing one is one appended line. Appends reach the kernel before the call returns, so SIGKILL loses
  none of them; a line cut short by it is dropped when the file is opened again. Barriers also reach the disk.
- A result is handed back as JSON reads it, fresh or resumed, so that both paths compute with the same values.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Self

from raysys import __version__
from raysys.runtime import environment
from raysys.runtime.config import Config, refuse_changes
from raysys.runtime.lock import RunLock
from raysys.runtime.metrics import Metrics, plain
from raysys.runtime.record import FORMAT, Record
from raysys.runtime.report import console_tables, figure_png, render_report
from raysys.runtime.sentences import UserError
from raysys.runtime.stage import Stage
from raysys.runtime.statistics import Interval
from raysys.runtime.storage import Log, Storage

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Run", "Stage"]
FLUSH_EVERY = 10.0


class Run:
    """One run of a job. Use `with Run.open(...) as run`."""

    def __init__(self, storage: Storage, record: Record, config: Config, lock: RunLock, resumed: bool) -> None:
        self.storage, self.record, self.config, self.resumed = storage, record, config, resumed
        self.status = "running"
        self.table: list[dict[str, Any]] = []
        self.claims: list[dict[str, Any]] = []
        self.grids: list[tuple[str, list[dict[str, Any]]]] = []
        self.figures: list[str] = []
        self.totals: dict[str, int] = {"messages": 0, "bytes": 0}
        self._unsaved: dict[str, int] = {}
        self._lock = lock
        self._started = self._flushed = time.time()
        self._stages: dict[str, Stage] = {}
        self._events = Log(storage, "events.jsonl")
        self._results = Log(storage, "results.jsonl")
        self.results: dict[str, dict[str, Any]] = {}
        for line in self._results.read():
            entry = json.loads(line)
            self.results[entry["stage"]] = entry["result"]
            self._add(entry["counts"])
        self.metrics = Metrics(storage, name=storage.uri.rpartition("/")[2], record=record, config=config)
        self._earlier_s = _seconds_worked(self.events(), self.metrics.earlier_times)
        self.event("opened", resumed=resumed, argv=sys.argv[1:], environment=environment.describe())
        self._previous_handler = self._end_cleanly_on_sigterm()

    @classmethod
    def open(cls, config: Config, *, system: str, command: str, argv: Sequence[str] | None = None) -> Self:
        """Make `<out>/<system>-<command>-<time>-<id>`, or reopen `config.resume` (with the configuration saved there).

        UserError if the folder cannot be made, is no run of this system and command, was started with other values
        than those given now, or is in use by another process.
        """
        resume = getattr(config, "resume", None)
        if resume:
            return cls._reopen(Storage(resume), config, system, command)
        created = datetime.now(UTC)
        name = f"{system}-{command}-{created:%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"
        out = getattr(config, "out", "runs")
        storage = Storage(out).join(name)
        words = list(sys.argv if argv is None else argv)
        record = Record(
            format=FORMAT, id=secrets.token_hex(8), system=system, command=command, argv=words,
            created=created.isoformat(timespec="seconds"), version=__version__,
        )  # fmt: skip
        try:
            if storage.local is not None:
                storage.local.mkdir(parents=True)
            lock = RunLock(storage)
            record.save(storage)
            storage.write_bytes("config.yaml", config.to_yaml().encode())
        except OSError as error:
            with contextlib.suppress(OSError):  # what cannot be written can perhaps be deleted; the error below tells
                Storage(out).delete(name)
            why = error.strerror or error
            raise UserError(f"out: got {out}; expected a folder or URI that can be written ({why})") from error
        return cls(storage, record, config, lock, resumed=False)

    @classmethod
    def _reopen(cls, storage: Storage, config: Config, system: str, command: str) -> Self:
        record = Record.of(storage)
        if (record.system, record.command) != (system, command):
            raise UserError(
                f"resume: got {storage.uri}, a run of {record.system} {record.command}; expected one of {system} {command}"
            )
        saved = type(config).load(storage.address("config.yaml"))
        refuse_changes(saved, config, config.model_fields_set)
        free: frozenset[str] = getattr(type(config), "free_on_resume", frozenset())
        now = {name: value for name, value in config.model_dump().items() if name in free & config.model_fields_set}
        lock = RunLock(storage)
        storage.sweep()
        return cls(storage, record, saved.with_values(now), lock, resumed=True)

    @property
    def path(self) -> str:
        """Path or URI of the run folder."""
        return self.storage.uri

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, UserError) and not self.resumed and not self.results:
            self._release()
            self.storage.delete("config.yaml")
            self.metrics.abandon()
            self._delete_all()  # bad input found late: nothing half-written stays
        elif error is None:
            self.close("finished")
        else:
            interrupted = isinstance(error, KeyboardInterrupt | SystemExit)
            self.event("interrupted" if interrupted else "failed", error=f"{type(error).__name__}: {error}")
            print(f"go on with: --resume {self.path}", file=sys.stderr, flush=True)
            self.close("interrupted" if interrupted else "failed")

    def stage(self, name: str) -> Stage:
        """A named unit of work: finished (it has a result), to be continued (it has a checkpoint), or new."""
        if name not in self._stages:
            self._stages[name] = Stage(self, name)
        return self._stages[name]

    def event(self, kind: str, **fields: Any) -> None:
        """Record that something happened: a host died, a checkpoint was refused, a node was late."""
        self._events.append(json.dumps({"t": round(time.time(), 3), "kind": kind, **plain(fields)}).encode())

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        """All events so far, or those of one kind."""
        rows = [json.loads(line) for line in self._events.read()]
        return [row for row in rows if kind in (None, row["kind"])]

    def count(self, *, messages: int = 0, bytes: int = 0) -> None:
        """Add to the run's traffic. What was counted is saved with the next finished stage."""
        for counts in (self.totals, self._unsaved):
            counts["messages"] = counts.get("messages", 0) + messages
            counts["bytes"] = counts.get("bytes", 0) + bytes

    def row(self, metric: str, interval: Interval, /, **compared: Any) -> None:
        """Add a row to the run's table: what was compared, the metric, mean, ci_low, ci_high, n."""
        numbers = {"mean": interval.mean, "ci_low": interval.low, "ci_high": interval.high, "n": interval.n}
        self.table.append({**compared, "metric": metric, **numbers})

    def claim(
        self,
        claim: str,
        source: str,
        holds: bool,
        interval: Interval | Sequence[float] | None = None,
        figure: str | None = None,
    ) -> None:
        """Record a claim of the paper and whether it held here; `figure` names one of the run's figures."""
        bounds = [interval.low, interval.high] if isinstance(interval, Interval) else interval and list(interval)
        entry = {"claim": claim, "source": source, "holds": bool(holds), "figure": figure, "interval": bounds}
        self.claims.append(entry)

    def grid(self, title: str, rows: list[dict[str, Any]]) -> None:
        """Show a table of its own form (rules against attacks, say) on the console and at the top of the report."""
        self.grids.append((title, rows))

    def figure(self, name: str, figure: Figure) -> str:
        """Save a matplotlib figure as figures/<name>.png, close it, and put it in the report. Returns its file name."""
        file = f"figures/{name}.png"
        self.storage.write_bytes(file, figure_png(figure), durable=False)
        if file not in self.figures:
            self.figures.append(file)
        return file

    def flush(self) -> None:
        """Make all that was logged durable."""
        self.metrics.flush()
        self._results.flush()
        self._events.flush()
        self._flushed = time.time()

    def close(self, status: str = "finished") -> None:
        """Write summary.json and report.html, print the tables and, as the last line, `run: <path>`; release the lock."""
        if self.status != "running":
            return
        self.status = status
        try:
            self.event(status)
            self.metrics.close(self.table)
            self.flush()
            summary = self.summary()
            self.storage.write_bytes("summary.json", json.dumps(summary, indent=1, allow_nan=False).encode())
            images = {name: self.storage.read_bytes(name) for name in self.figures}
            page = render_report(summary, self.record, self.config, self.grids, images, self.events())
            self.storage.write_bytes("report.html", page.encode())
        finally:
            self._release()
        console_tables(summary, self.grids)
        print(f"run: {self.path}", flush=True)

    def summary(self) -> dict[str, Any]:
        """What summary.json holds."""
        seed, seeds = getattr(self.config, "seed", 0), getattr(self.config, "seeds", 1)
        return {
            "system": self.record.system,
            "command": self.record.command,
            "status": self.status,
            "config": self.config.model_dump(mode="json"),
            "seeds": list(range(seed, seed + seeds)),
            "wall_s": round(self._earlier_s + time.time() - self._started, 3),
            "peak_rss_mb": round(environment.peak_rss_mb(), 1),
            "messages": self.totals["messages"],
            "bytes": self.totals["bytes"],
            "table": plain(self.table),
            "claims": plain(self.claims),
            "figures": self.figures,
            "environment": environment.describe(),
            "resumed": len(self.events("opened")) - 1,
            "version": __version__,
        }

    def record_result(self, stage: str, result: Mapping[str, Any]) -> dict[str, Any]:
        """Append a finished stage to results.jsonl; returns the result as it will be read."""
        line = json.dumps({"stage": stage, "result": result, "counts": self._unsaved}, default=_number)
        self._results.append(line.encode())
        self._unsaved = {}
        if time.time() - self._flushed > FLUSH_EVERY:
            self.flush()
        self.results[stage] = json.loads(line)["result"]
        return self.results[stage]

    def _add(self, counts: Mapping[str, int]) -> None:
        for name, number in counts.items():
            self.totals[name] = self.totals.get(name, 0) + number

    def record_refusal(self, name: str, reason: str) -> None:
        """Say and record that a checkpoint was passed over."""
        print(f"warning: checkpoint refused: {reason}; using the one before it", file=sys.stderr, flush=True)
        self.event("checkpoint refused", checkpoint=name, reason=reason)

    def _release(self) -> None:
        self._events.close()
        self._results.close()
        self._lock.release()
        if self._previous_handler is not None:
            signal.signal(signal.SIGTERM, self._previous_handler)
            self._previous_handler = None

    def _delete_all(self) -> None:
        parent, _, name = self.storage.uri.rpartition("/")
        Storage(parent or "/").delete(name)

    def _end_cleanly_on_sigterm(self) -> Any:
        """`ray job stop` and batch systems send SIGTERM: end as on Ctrl-C, with a summary."""

        def stop(number: int, frame: FrameType | None) -> None:
            raise SystemExit(128 + number)

        if threading.current_thread() is threading.main_thread():
            return signal.signal(signal.SIGTERM, stop)
        return None


def _number(value: Any) -> Any:
    if hasattr(value, "tolist"):  # numpy and torch, scalars and arrays
        return value.tolist()
    raise TypeError(f"a stage's result holds numbers, texts, lists and dicts, got {type(value).__name__}")


def _seconds_worked(events: list[dict[str, Any]], measured: list[float]) -> float:
    """Seconds that earlier processes worked on this run: from each opening to the last trace before the next."""
    openings = [event["t"] for event in events if event["kind"] == "opened"]
    traces = sorted([event["t"] for event in events] + measured)
    total = 0.0
    for opened, following in zip(openings, [*openings[1:], float("inf")], strict=False):
        total += max(t for t in traces if opened <= t < following) - opened
    return total
