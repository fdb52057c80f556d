"""What is measured of the peers' factors: the cross term and disagreements every round, accuracies where a test is due.

Shapes: n peers, N test items, flat factors A (n, size_a), B (n, size_b).

Notable choices
- Accuracy is that of each peer's own model on the common test items, averaged over peers (the paper's metric); the model of
  the averaged factors is another number, which no peer could have, and is always named `consensus_accuracy`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from raysys.graph import RunningContraction
from raysys.runtime.seeds import Stream
from raysys.systems.tad_lora.combine import cross_term
from raysys.systems.tad_lora.peers import State, present
from raysys.systems.tad_lora.task import Task

F32 = NDArray[np.float32]


def evaluate(task: Task, parts: Sequence[State]) -> dict[str, float]:
    """Measurements after a round, from the statistics of all blocks.

    broken: peers whose factors are not finite, left out of all else (with none left there is nothing else).
    cross_term: ||C||_F over all layers, C = mean product minus product of means; relative_cross_term: over ||Bbar Abar||_F;
    disagreement_a, disagreement_b: D_A = (1/n) sum_i ||A_i - Abar||^2, and D_B; consensus: their sum; rho: running estimate
    from the mixing matrices so far; and where a test was due accuracy (or relative error), worst, spread and consensus.
    """
    a, b = (torch.from_numpy(np.concatenate([p[name] for p in parts])) for name in ("a", "b"))
    whole = a.isfinite().all(1) & b.isfinite().all(1)
    broken = {"broken": float((~whole).sum())}
    if not whole.any():
        return broken
    a, b = a[whole], b[whole]
    layout = task.layout
    squares = [cross_term(a_l, b_l) for a_l, b_l in zip(layout.split_a(a), layout.split_b(b), strict=True)]
    cross = layout.scale * sum(c for c, _ in squares) ** 0.5
    product = layout.scale * sum(p for _, p in squares) ** 0.5
    spread_a, spread_b = disagreement(a), disagreement(b)
    found = broken | {
        "cross_term": cross,
        "relative_cross_term": cross / product if product else 0.0,
        "disagreement_a": spread_a,
        "disagreement_b": spread_b,
        "consensus": spread_a + spread_b,
    }
    if task.process is not None and int(parts[0]["round"]) >= 0:
        found["rho"] = realised_rho(task, int(parts[0]["round"]))
    if "right" in parts[0]:
        right = np.concatenate([p["right"] for p in parts])[whole.numpy()]
        found |= scores(task, right, consensus_right(task, parts, a, b))
    return found


def disagreement(factors: torch.Tensor) -> float:
    """(1/n) sum_i ||X_i - Xbar||^2 of flat factors (n, size)."""
    exact = factors.double()
    return float((exact - exact.mean(0)).square().sum(1).mean())


def consensus_right(task: Task, parts: Sequence[State], a: torch.Tensor, b: torch.Tensor) -> F32:
    """(1, N): how right the model of the averaged factors is."""
    names = sorted((key for key in parts[0] if key.startswith("shift.")), key=lambda key: int(key[6:]))
    shift = [torch.from_numpy(parts[0][name]) for name in names] or None
    means = [factor.double().mean(0).float()[None] for factor in (a, b)]
    return task.learner.evaluate(np.zeros(1, np.int64), means[0], means[1], shift)


def scores(task: Task, right: F32, consensus: F32) -> dict[str, float]:
    """Mean over peers, the worst peer, the standard deviation over peers, and the averaged model."""
    each = right.astype(np.float64).mean(1)
    name, worst = ("error", each.max()) if task.setting.problem == "regression" else ("accuracy", each.min())
    return {
        name: float(each.mean()),
        f"worst_{name}": float(worst),
        f"spread_{name}": float(each.std()),
        f"consensus_{name}": float(consensus.astype(np.float64).mean()),
    }


def realised_rho(task: Task, round: int) -> float:
    """Running estimate of the contraction rate from the mixing matrices of rounds 0..round (spec 2.5, selector (ii)).

    The sums are kept on the task and rebuilt from round 0 where a replay went back.
    """
    assert task.process is not None
    running, done = task.__dict__.get("_realised", (RunningContraction(task.setting.peers), 0))
    if done > round + 1:
        running, done = RunningContraction(task.setting.peers), 0
    for t in range(done, round + 1):
        running.add(task.process.mixing(t, task.seeds.rng(Stream.GRAPH, 0, t), present(task.setting, task.seeds, t)))
    task.__dict__["_realised"] = (running, round + 1)
    return running.value
