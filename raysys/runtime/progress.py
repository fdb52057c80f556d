"""How far a job is, on the console: a bar with rate and remaining time on a terminal, plain lines otherwise."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

PLAIN_EVERY = 5.0
"""Seconds between plain lines."""


class Progress:
    """Context manager: `with Progress(rounds, "train") as progress: ... progress.advance()`. Writes to stderr.

    `done` counts what a resumed run need not do again: it moves the bar and not the rate.
    """

    def __init__(self, total: int, description: str, *, unit: str = "rounds", done: int = 0) -> None:
        self.total, self.description, self.unit = total, description, unit
        self.done, self._before = done, done
        self._note = ""
        self._console = Console(file=sys.stderr)
        self._started = self._said = time.monotonic()
        self._said_done = -1
        self._bar: Bar | None = None
        self._task = TaskID(0)
        if self._console.is_terminal:
            columns = (
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}", style="dim"),
            )  # fmt: skip
            self._bar = Bar(*columns, console=self._console, refresh_per_second=4)
            self._task = self._bar.add_task(description, total=total, completed=done, rate="", note="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        else:
            self._say()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self.done != self._said_done:
            self._say()

    def advance(self, n: int = 1) -> None:
        """n more units are done."""
        self.done += n
        self._show()

    def rewind(self, done: int) -> None:
        """Go back to `done` units, after a recovery."""
        self.done = done
        self._show()

    def note(self, text: str) -> None:
        """A few words beside the bar: the loss, what failed, what is being evaluated."""
        self._note = text
        self._show()

    def rate(self) -> float:
        """Units per second since the start."""
        return max(self.done - self._before, 0) / max(time.monotonic() - self._started, 1e-9)

    def _show(self) -> None:
        if self._bar is not None:
            rate = f"{self.rate():.3g} {self.unit}/s"
            self._bar.update(self._task, completed=self.done, rate=rate, note=self._note)
        elif time.monotonic() - self._said >= PLAIN_EVERY:
            self._say()

    def _say(self) -> None:
        self._said, self._said_done = time.monotonic(), self.done
        rate, left = self.rate(), self.total - self.done
        remaining = f", {rate:.3g} {self.unit}/s, {left / rate:.0f} s left" if rate > 0 and left > 0 else ""
        note = f" ({self._note})" if self._note else ""
        print(f"{self.description}: {self.done}/{self.total} {self.unit}{remaining}{note}", file=sys.stderr, flush=True)
