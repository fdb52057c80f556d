"""A small learner in the shape of real ones, for the tests of training; as a program it is a job that kills itself."""

from __future__ import annotations

import math
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from jobs_for_tests import Walk
from torch import Tensor, nn

from raysys.runtime.run import Run
from raysys.runtime.seeds import Seeds, Stream
from raysys.runtime.train import TrainConfig, fit_here


class Regression:
    """A perceptron (frozen first layer, dropout) or a linear model fitted to made-up numbers.

    `deadly` names a file: the worker that first makes `deadly_step` while it is absent writes it and kills itself.
    """

    blocks = 4

    def __init__(
        self,
        device: str,
        *,
        steps: int = 12,
        kind: str = "sgd",
        linear: bool = False,
        deadly: str = "",
        deadly_step: int = 7,
        deadly_block: int = 1,
        bad_step: int = -1,
        raises_at: int = -1,
    ) -> None:
        self.steps, self.kind, self.device = steps, kind, device
        self.deadly, self.deadly_step, self.deadly_block = deadly, deadly_step, deadly_block
        self.bad_step, self.raises_at = bad_step, raises_at
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            hidden = [nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 33), nn.Tanh(), nn.Linear(33, 1)]
            self.module = nn.Linear(6, 1) if linear else nn.Sequential(*hidden)
        if not linear:
            self.module[0].requires_grad_(False)  # type: ignore[index, union-attr]
        self.module.register_buffer("seen", torch.zeros(1))
        self.module.to(device)

    def batch(self, step: int, block: int) -> tuple[Tensor, Tensor]:
        """(5, 6) inputs and (5, 1) targets."""
        x = torch.randn(5, 6, generator=Seeds(1).generator(Stream.BATCH, block, step))
        return x.to(self.device), (x.sum(1, keepdim=True).sin() + 2.0).to(self.device)

    def loss(self, step: int, block: int) -> Tensor:
        if self.deadly and (step, block) == (self.deadly_step, self.deadly_block) and not os.path.exists(self.deadly):
            Path(self.deadly).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if step == self.raises_at and block == 1:
            raise KeyError("a bug in the learner")
        x, y = self.batch(step, block)
        squares = (self.module(x) - y).square().mean()
        self.last = float(squares.detach())
        return squares * math.nan if step == self.bad_step else squares

    def learning_rate(self, step: int) -> float:
        return 0.05 / (1 + step)

    def optimizer(self) -> torch.optim.Optimizer:
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        if self.kind == "sgd":
            return torch.optim.SGD(parameters)
        if self.kind == "momentum":
            return torch.optim.SGD(parameters, momentum=0.9, weight_decay=0.01)
        return torch.optim.AdamW(parameters, weight_decay=0.01)

    def metrics(self) -> dict[str, float]:
        return {"rmse": math.sqrt(self.last)}

    def before(self, step: int) -> None:
        self.module.seen = torch.full((step + 1,), float(step), device=self.device)  # a buffer whose shape changes


def regression(**options: object) -> Callable[[str], Regression]:
    return partial(Regression, **options)  # type: ignore[arg-type]


if __name__ == "__main__":
    out = sys.argv[2]
    with Run.open(Walk(out=out, wandb=False), system="walk", command="walk") as run:
        fit_here(run.stage("train"), regression(deadly=f"{out}/died"), TrainConfig(checkpoint_every=5), log_every=1)
