"""What is measured of a model under training.

Shapes: h honest workers, d parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from raysys.systems.byzantine.task import Task
from raysys.systems.byzantine.workers import State


def evaluate_server(task: Task, model: NDArray[np.float32], parts: Sequence[State]) -> dict[str, float]:
    """Test score of the server's model (d,), and from the honest workers' statistics: |grad L_H|^2, the dissimilarity
    (1/h) sum |grad L_i - grad L_H|^2, the gradient noise sigma^2, mean and worst local loss."""
    count = sum(int(p["count"]) for p in parts)
    gradient = np.sum([p["gradient"] for p in parts], axis=0) / count
    square = sum(float(p["square"]) for p in parts) / count
    loss = np.concatenate([p["loss"] for p in parts])
    norm = float(gradient @ gradient)
    return task.problem.score(torch.from_numpy(model)) | {
        "gradient_sq": norm,
        "dissimilarity": max(square - norm, 0.0),
        "noise": sum(float(p["noise"]) for p in parts) / count,
        "loss": float(loss.mean()),
        "worst_loss": float(loss.max()),
    }


def evaluate_peers(task: Task, parts: Sequence[State]) -> dict[str, float]:
    """Score of the average honest model, the worst peer's score, and the consensus distance (1/h) sum |x_i - mean|^2."""
    models = np.concatenate([p["models"] for p in parts])
    loss = np.concatenate([p["loss"] for p in parts])
    mean = models.astype(np.float64).mean(0)
    spread = float(np.square(models - mean).sum(1).mean())
    each = [task.problem.score(torch.from_numpy(m)) for m in models]
    worst = {f"worst_{k}": (min if k == "accuracy" else max)(e[k] for e in each) for k in each[0]}
    score = task.problem.score(torch.from_numpy(mean.astype(np.float32)))
    return score | worst | {"consensus": spread, "loss": float(loss.mean()), "worst_loss": float(loss.max())}
