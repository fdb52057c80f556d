"""What the benchmarks of rounds write: the same fields, whatever was measured."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from aggregation_vs_byzfl import cpu

NEEDED = ("case", "ours", "peer", "unit", "ratio", "rel_diff")


def machine() -> dict[str, Any]:
    """Cores, versions, and how busy the machine was when asked."""
    import ray
    import torch

    return {
        "cpu": cpu(), "cores": len(os.sched_getaffinity(0)), "python": platform.python_version(), "ray": ray.__version__,
        "torch": torch.__version__, "numpy": np.__version__, "load": round(os.getloadavg()[0], 2),
    }  # fmt: skip


def result(peer: str, version: str, rows: Sequence[dict[str, Any]], began: float, **more: Any) -> dict[str, Any]:
    """The results of one benchmark, from its rows; `ratio` above 1 means that we are better.

    Args:
        rows: each with at least the fields NEEDED; `rel_diff` is the relative difference of the two sides' results.
        began: time.monotonic() at the start.
    """
    for row in rows:
        if missing := [field for field in NEEDED if field not in row]:
            raise ValueError(f"row {row.get('case')!r} lacks {', '.join(missing)}")
    ratios = np.array([row["ratio"] for row in rows])
    return {
        "peer": peer, "peer_version": version, "rows": list(rows), "geomean_ratio": float(np.exp(np.log(ratios).mean())),
        "min_ratio": float(ratios.min()), "max_rel_diff": max(float(row["rel_diff"]) for row in rows), **more,
        "memory": "peak PSS of the process tree, sampled every second", "wall_s": time.monotonic() - began,
        "machine": machine(),
    }  # fmt: skip


def write(path: Path | None, result: dict[str, Any]) -> None:
    """As JSON, where a path was given."""
    if path is not None:
        path.write_text(json.dumps(result, indent=1))
