"""Mixing of many peers on a sparse graph, at the size of an adapter, against the speed of memory and two sparse libraries.

    python benchmarks/mixing.py [--json PATH] [--quick]

1,000 peers with a row of 73,728 float32 each (both factors of the default adapter), one thread, the best processor time of
the repetitions (the wall time of an idle machine), the sides taking turns. "stream" is STREAM's scale (b = s a) over the
same rows in the same compiler: every row read once and written once, the least a round can do with ordinary stores. "copy"
is numpy's copy, whose stores bypass the cache (a third less traffic). Peers: scipy.sparse CSR @ dense and torch.sparse.mm,
float32 weights and sums where ours sum in float64.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_NUM_THREADS", "1")

import numpy as np
import results
import scipy
import scipy.sparse
import torch
from numba import njit

ROOT = Path(__file__).resolve().parent.parent
PEERS, COLUMNS = 1000, 73_728
GRAPHS = ("static(random_regular(degree=4))", "ring", "erdos_renyi(p=0.004)")
GOAL = 2.0


@njit(nogil=True)
def scale(a, b, s):  # type: ignore[no-untyped-def]
    for k in range(a.size):
        b[k] = s * a[k]


def timed(sides: dict[str, Callable[[], Any]], repetitions: int) -> dict[str, float]:
    """Milliseconds of each, the best of the repetitions."""
    best = dict.fromkeys(sides, float("inf"))
    for _ in range(repetitions + 1):  # the first time compiles and touches the pages
        for name, run in sides.items():
            begin = time.thread_time()
            run()
            best[name] = min(best[name], 1e3 * (time.thread_time() - begin))
    return best


def measure(spec: str, peers: int, columns: int, repetitions: int) -> list[dict[str, Any]]:
    from raysys.graph import gossip, make_process, to_csr

    rng = np.random.default_rng(0)
    matrix = make_process(spec, peers, "metropolis_hastings", rng).mixing(0, rng)
    indptr, indices, weights = to_csr(matrix)
    rows = rng.standard_normal((peers, columns), dtype=np.float32)
    out = np.zeros_like(rows)
    theirs = scipy.sparse.csr_matrix((weights.astype(np.float32), indices, indptr), shape=matrix.shape)
    tensor = torch.sparse_csr_tensor(
        torch.from_numpy(indptr), torch.from_numpy(indices), torch.from_numpy(weights).float(), matrix.shape
    )
    dense = torch.from_numpy(rows)
    best = timed(
        {
            "ours": lambda: gossip.mix(rows, indptr, indices, weights, out),
            "stream": lambda: scale(rows.reshape(-1), out.reshape(-1), np.float32(0.5)),
            "copy": lambda: np.copyto(out, rows),
            "scipy": lambda: theirs @ rows,
            "torch": lambda: torch.sparse.mm(tensor, dense),
        },
        repetitions,
    )
    ours = gossip.mix(rows, indptr, indices, weights)
    found = {"scipy": theirs @ rows, "torch": torch.sparse.mm(tensor, dense).numpy()}
    print(
        f"{spec}: degree {len(indices) / peers - 1:.2f}, ours {best['ours']:.1f} ms = x{best['ours'] / best['stream']:.2f} of "
        f"stream ({best['stream']:.1f} ms), x{best['ours'] / best['copy']:.2f} of copy ({best['copy']:.1f} ms); "
        f"scipy {best['scipy']:.1f} ms, torch {best['torch']:.1f} ms",
        flush=True,
    )
    return [
        {
            "case": f"{spec}, {peers} peers, {name}", "ours": best["ours"], "peer": best[name], "unit": "ms",
            "ratio": best[name] / best["ours"], "stream_ms": best["stream"], "copy_ms": best["copy"],
            "of_stream": best["ours"] / best["stream"], "degree": len(indices) / peers - 1,
            "rel_diff": float(np.linalg.norm(found[name] - ours) / np.linalg.norm(ours)),
        }
        for name in ("scipy", "torch")
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--quick", action="store_true", help="100 peers, two repetitions")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    warnings.filterwarnings("ignore", message="Sparse", category=UserWarning)  # torch calls its sparse tensors beta
    torch.set_num_threads(1)
    began = time.monotonic()
    peers, repetitions = (100, 2) if arguments.quick else (PEERS, 15)
    rows = [row for spec in GRAPHS for row in measure(spec, peers, COLUMNS, repetitions)]
    worst = max(row["of_stream"] for row in rows)
    goals = [
        {
            "goal": f"mixing of {peers} peers within {GOAL:g} times the memory-bandwidth time", "measured": worst,
            "limit": GOAL, "met": worst < GOAL,
        }
    ]  # fmt: skip
    version = f"{scipy.__version__}, {torch.__version__}"
    result = results.result("scipy.sparse, torch.sparse", version, rows, began, goals=goals)
    result.pop("memory")  # nothing is sampled here
    for row in rows:
        print(f"{row['case']}: x{row['ratio']:.1f}, results differ by {row['rel_diff']:.1e}")
    for goal in goals:
        print(f"{'met' if goal['met'] else 'MISSED'}: {goal['goal']}: {goal['measured']:.2f}")
    results.write(arguments.json, result)


if __name__ == "__main__":
    main()
