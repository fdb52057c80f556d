"""Where a run ran: versions, machine, memory. What a reader needs to repeat it."""

from __future__ import annotations

import os
import platform
import resource
import socket
import sys
from importlib import metadata
from pathlib import Path

from raysys import __version__

PACKAGES = ("ray", "torch", "numpy", "scipy", "numba", "scikit-learn", "pyarrow", "safetensors", "pydantic")


def cores() -> int:
    """CPUs this process may use (all of the machine where the system does not say)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe() -> dict[str, str]:
    """Host, cores, memory and versions, as text."""
    facts = {
        "raysys": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cores": str(cores()),
        "memory_gb": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f}",
    }
    for package in PACKAGES:
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            facts[package] = "not installed"
    return facts


def peak_rss_mb() -> float:
    """Peak resident memory of this process and of all its descendants alive now (an embedded Ray among them), in MB.

    The sum of each process's own peak: an upper bound of the joint peak, as peaks need not coincide and shared pages
    count for each process. Processes that have ended are not in it. Elsewhere than on Linux: this process alone.
    """
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
    if not Path("/proc/self/status").exists():
        return own
    parents: dict[int, int] = {}
    peaks: dict[int, float] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                status = dict(
                    line.split(":\t", 1) for line in (entry / "status").read_text().splitlines() if ":\t" in line
                )
            except OSError:
                continue  # it ended while we looked
            parents[int(entry.name)] = int(status["PPid"])
            peaks[int(entry.name)] = float(status.get("VmHWM", "0 kB").split()[0]) * 1024 / 1e6
    family = {os.getpid()}
    while True:
        grown = family | {pid for pid, parent in parents.items() if parent in family}
        if grown == family:
            return own + sum(peaks[pid] for pid in family - {os.getpid()})
        family = grown
