"""The regression problem for many methods and seeds side by side: what `jobs.tad_lora theory` tabulates.

Shapes: c arms (a method with its interval), s seeds, n peers; factors A (c, s, n, r, d), B (c, s, n, d, r).

Notable choices
- All arms of a seed see the same targets, start, gradient noise and graphs, so differences between arms are paired.
- Scores are averaged over the last rounds, a window of whole cycles of every interval: a run that ends inside a phase, with
  the frozen factor fully mixed, would look too good.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raysys.graph import make_process
from raysys.runtime.seeds import Seeds, Stream
from raysys.systems.tad_lora import regression
from raysys.systems.tad_lora.policies import make_policy

Arm = tuple[str, int, float]
"""Method, switching interval T (0 where it has none), step size."""
COMMON_STEP = 0.01
"""The step size of the specification, for tables in which all arms have the same."""


@dataclass(frozen=True)
class Study:
    """The problem of a table. Defaults are those of the specification, 5.2."""

    peers: int = 10
    rounds: int = 150
    steps: int = 20
    heterogeneity: float = 0.5
    noise: float = 0.5
    weights: str = "metropolis_hastings"
    adam: bool = False
    window: int = 30


def run_arms(study: Study, topology: str, arms: list[Arm], seeds: list[int]) -> list[dict[str, Any]]:
    """One row per arm: per seed the relative error of the peers, of the averaged model, and ||C||_F, all averaged
    over the last `window` rounds. Only methods that mix factors. An arm that diverged on any seed (with a fixed step size, long
    phases let the trained factor grow until the other one's step is too large) gives a row with "error" None."""
    policies = [make_policy(method, max(interval, 1)) for method, interval, _ in arms]
    lr = torch.tensor([step for _, _, step in arms])[:, None, None, None, None]
    streams = [Seeds(seed) for seed in seeds]
    n, everyone = study.peers, np.arange(study.peers)
    processes = [make_process(topology, n, study.weights, stream.rng(Stream.GRAPH)) for stream in streams]
    target = torch.stack([regression.targets(n, study.heterogeneity, stream) for stream in streams])
    mean_target = target.mean(1)
    layout = regression.LAYOUT
    starts = [regression.start(stream) for stream in streams]
    shape = (len(arms), len(seeds), n)
    a = torch.stack([layout.split_a(a0)[0] for a0, _ in starts])[None, :, None].expand(*shape, -1, -1).clone()
    b = torch.stack([layout.split_b(b0)[0] for _, b0 in starts])[None, :, None].expand(*shape, -1, -1).clone()
    totals = {name: torch.zeros(shape[:2], dtype=torch.float64) for name in ("error", "consensus_error", "cross_term")}
    for t in range(study.rounds):
        noise = torch.stack([regression.noises(stream, everyone, t, study.steps, study.noise) for stream in streams])
        learn_a, learn_b = (_mask([name in policy.trains(t) for policy in policies]) for name in "AB")
        a, b = regression.local_steps(a, b, target, noise, lr, learn_a, learn_b, study.adam)
        mixing = torch.stack(
            [
                torch.from_numpy(process.mixing(t, stream.rng(Stream.GRAPH, 0, t))).float()
                for process, stream in zip(processes, streams, strict=True)
            ]
        )
        a = torch.where(_mask(["A" in policy.mixes(t) for policy in policies]) > 0, _mixed(mixing, a), a)
        b = torch.where(_mask(["B" in policy.mixes(t) for policy in policies]) > 0, _mixed(mixing, b), b)
        if t >= study.rounds - study.window:
            a_mean, b_mean = a.mean(2), b.mean(2)
            cross = (b @ a).mean(2) - b_mean @ a_mean
            totals["error"] += regression.relative_error(a, b, mean_target[:, None]).mean(2)
            totals["consensus_error"] += regression.relative_error(a_mean, b_mean, mean_target)
            totals["cross_term"] += cross.square().sum((-1, -2)).sqrt()
    rows: list[dict[str, Any]] = []
    for i, (method, interval, step) in enumerate(arms):
        row: dict[str, Any] = {"method": method, "interval": interval, "lr": step, "topology": topology}
        finite = all(bool(total[i].isfinite().all()) for total in totals.values())
        rows.append(
            row | {name: (total[i] / study.window).tolist() if finite else None for name, total in totals.items()}
        )
    return rows


def _mask(chosen: list[bool]) -> Tensor:
    return torch.tensor(chosen, dtype=torch.float32)[:, None, None, None, None]


def _mixed(mixing: Tensor, x: Tensor) -> Tensor:
    """sum_j W_ij X_j with W (s, n, n) and X (c, s, n, p, q)."""
    return (mixing @ x.flatten(3)).view(x.shape)
