"""Heterogeneous low-rank matrix regression: the bilinear problem of decentralised LoRA with its optimum known exactly.

f_i(A, B) = 1/2 ||B A - M_i||_F^2 with M_i = M* + D_i, D_i of rank 2 and zero in the mean over peers (spec 5.2, our own
construction; the paper has no such experiment). A model is scored by ||B_i A_i - Mbar||^2 / ||Mbar||^2.

Shapes: n peers, k of a call, r rank, M (n, d, d) with d = 16.

Notable choices
- Gradients carry Gaussian noise per entry, as mini-batches would; it is drawn per (seed, peer, round) for all steps at once.
- A step is the same arithmetic whether one experiment or a hundred run side by side: leading dimensions are free.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raysys.nn.lora import Layout
from raysys.runtime.seeds import Seeds, Stream
from raysys.systems.tad_lora.setting import Setting

I64 = NDArray[np.int64]
F32 = NDArray[np.float32]
D, RANK = 16, 4
LAYOUT = Layout(("matrix",), ((D, D),), RANK, float(RANK))
"""One layer, s = 1."""


def targets(n: int, heterogeneity: float, seeds: Seeds) -> Tensor:
    """(n, d, d) float32: each peer's own target M_i; their mean is M* exactly up to rounding."""
    rng = seeds.rng(Stream.PARTITION)
    common = rng.normal(size=(D, RANK)) @ rng.normal(size=(RANK, D)) / RANK**0.5
    own = heterogeneity * (rng.normal(size=(n, D, 2)) @ rng.normal(size=(n, 2, D))) / 2**0.5
    return torch.from_numpy(common + own - own.mean(0)).float()


def start(seeds: Seeds) -> tuple[Tensor, Tensor]:
    """A uniform in +-sqrt(3/d), so that its entries have variance 1/d; B zero. Flat: (size_a,), (size_b,)."""
    drawn = seeds.rng(Stream.INIT).uniform(-1, 1, LAYOUT.size_a) * (3 / D) ** 0.5
    return torch.from_numpy(drawn).float(), torch.zeros(LAYOUT.size_b)


def noises(seeds: Seeds, nodes: I64, round: int, steps: int, scale: float) -> Tensor:
    """(k, K, d, d) noise of a round's gradients."""
    drawn = [seeds.rng(Stream.BATCH, int(i), round).standard_normal((steps, D, D), dtype=np.float32) for i in nodes]
    return torch.from_numpy(np.stack(drawn)) * scale


def local_steps(
    a: Tensor,
    b: Tensor,
    target: Tensor,
    noise: Tensor,
    lr: float | Tensor,
    learn_a: Tensor,
    learn_b: Tensor,
    adam: bool,
) -> tuple[Tensor, Tensor]:
    """K stochastic gradient (or Adam) steps on 1/2 ||B A - M||^2 from (..., r, d) and (..., d, r).

    target (..., d, d); noise (..., K, d, d); lr: one step size, or one per leading entry. learn_a, learn_b: 1 where a factor
    learns and 0 where it is frozen, broadcastable to a and b. Adam starts anew (betas .9, .999, eps 1e-8).
    """
    moments = [torch.zeros_like(x) for x in (a, a, b, b)]
    step_a, step_b = lr * learn_a, lr * learn_b
    for step in range(noise.shape[-3]):
        error = b @ a - target + noise[..., step, :, :]
        grad_a, grad_b = b.transpose(-1, -2) @ error, error @ a.transpose(-1, -2)
        if adam:
            grad_a = _adam(grad_a, moments[0], moments[1], step + 1)
            grad_b = _adam(grad_b, moments[2], moments[3], step + 1)
        a, b = a - step_a * grad_a, b - step_b * grad_b
    return a, b


def _adam(grad: Tensor, first: Tensor, second: Tensor, step: int) -> Tensor:
    first.mul_(0.9).add_(grad, alpha=0.1)
    second.mul_(0.999).addcmul_(grad, grad, value=0.001)
    return first / (1 - 0.9**step) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)


def relative_error(a: Tensor, b: Tensor, mean_target: Tensor) -> Tensor:
    """||B A - Mbar||^2 / ||Mbar||^2 of (..., r, d), (..., d, r) against a target broadcastable to (..., d, d): (...)."""
    return (b @ a - mean_target).square().sum((-1, -2)) / mean_target.square().sum((-1, -2))


class RegressionLearner:
    """The problem as one block of peers sees it. Full batches do not exist: noise stands for sampling."""

    layout = LAYOUT

    def __init__(self, setting: Setting, seeds: Seeds) -> None:
        self.setting, self.seeds = setting, seeds
        # A centralised node has the mean target: the sum of all peers' losses is its loss up to a constant.
        self.targets = targets(setting.peers, setting.heterogeneity, seeds)

    def train(
        self, nodes: I64, a: Tensor, b: Tensor, round: int, active: str, moments: object, shift: Sequence[Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        s = self.setting
        target = self.targets[nodes] - (0.0 if shift is None else shift[0])
        drawn = noises(self.seeds, nodes, round, s.steps, s.noise)
        learn_a, learn_b = torch.tensor(float("A" in active)), torch.tensor(float("B" in active))
        new_a, new_b = local_steps(
            self.layout.split_a(a)[0], self.layout.split_b(b)[0], target, drawn, s.step_size(round), learn_a, learn_b,
            s.optimizer == "adamw",
        )  # fmt: skip
        return self.layout.join([new_a]), self.layout.join([new_b])

    def evaluate(self, nodes: I64, a: Tensor, b: Tensor, shift: Sequence[Tensor] | None) -> F32:
        target = self.targets.mean(0) - (0.0 if shift is None else shift[0])
        whole = self.targets.mean(0)
        error = (self.layout.split_b(b)[0] @ self.layout.split_a(a)[0] - target).square().sum(
            (-1, -2)
        ) / whole.square().sum()
        return error[:, None].numpy()
