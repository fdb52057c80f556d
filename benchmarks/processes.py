"""One side of a benchmark as a process of its own: run it, and watch the memory of it and all its descendants.

Memory is PSS (proportional set size): private pages, plus each shared page divided by the number of processes that map it,
so that libraries and Ray's shared object store are counted once. Sampled every second: a shorter peak can be missed.
It is read from /proc and therefore known on Linux only; elsewhere it is reported as 0.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

EVERY = 1.0


class Finished(NamedTuple):
    """A process that has ended: when it was started (time.monotonic), how long it took, its peak memory."""

    started: float
    seconds: float
    peak_mb: float


def run(command: Sequence[str], env: Mapping[str, str], limit_s: float = 900.0) -> Finished:
    """Run one side of a benchmark. The Ray that it starts is its own: another cluster on this machine is not joined.

    Raises:
        RuntimeError: it failed; with the end of what it wrote.
    """
    with tempfile.TemporaryFile("w+") as words, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as ray_folder:
        apart = {"RAY_ADDRESS": "", "RAY_TMPDIR": ray_folder, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
        started = time.monotonic()
        process = subprocess.Popen(command, env={**os.environ, **apart, **env}, stdout=words, stderr=subprocess.STDOUT)
        peak, ended = [0.0], threading.Event()
        watcher = threading.Thread(target=_watch, args=(process.pid, peak, ended), daemon=True)
        watcher.start()
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            process.terminate()
            code = process.wait()
        seconds = time.monotonic() - started
        ended.set()
        watcher.join()
        if code:
            words.seek(0)
            raise RuntimeError(f"{' '.join(command)} ended with code {code}:\n{words.read()[-3000:]}")
    return Finished(started, seconds, peak[0])


def _watch(pid: int, peak: list[float], ended: threading.Event) -> None:
    while not ended.wait(EVERY):
        peak[0] = max(peak[0], sum(map(pss_mb, tree(pid))))


def tree(root: int) -> list[int]:
    """A process and all its descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(entry.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended in between
            continue
        children.setdefault(parent, []).append(int(entry.parent.name))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found


def pss_mb(pid: int) -> float:
    """Proportional set size of one process in MB; 0 if it has ended."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0.0
    kb = next((line.split()[1] for line in rollup.splitlines() if line.startswith("Pss:")), "0")
    return int(kb) * 1024 / 1e6
