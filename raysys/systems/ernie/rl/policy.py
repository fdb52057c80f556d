"""What is trained and drawn from: the interface of reinforcement learning to a model, and the unified model behind it.

Shapes: R rows, n tokens of the longest answer, L layers, k experts of a token.

Notable choices
- The rollout engine and the training engine are the same module here. Real systems have two, which differ in the last bits;
  `mismatched` imitates that in the open: rollouts compute with weights rounded to bfloat16, or whose routers have noise.
- Balancing biases stay as pre-training left them (INFERRED), and the module stays in evaluation mode.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raysys.nn.moe import MoE
from raysys.runtime.seeds import Seeds, Stream
from raysys.systems.ernie.generate import Written, answer_logp, write
from raysys.systems.ernie.model import UniModel

I64 = NDArray[np.int64]
Routes = Sequence[NDArray[np.int16]]
Weights = Mapping[str, np.ndarray]
"""A module's parameters and buffers by name."""


class Policy(Protocol):
    """A distribution over answers to prompts. Prompts are the policy's own business."""

    @property
    def module(self) -> nn.Module: ...  # its parameters with requires_grad are trained

    def write(
        self, prompts: Sequence[Any], begun: Sequence[I64], *, limit: int, temperature: float, generator: torch.Generator,
        routes: bool,
    ) -> Written:  # fmt: skip
        """Go on from the beginnings `begun` of answers; see `generate.write`. Temperature 0 takes the most likely."""

    def answer_logp(
        self, prompts: Sequence[Any], answers: Sequence[I64], *, temperature: float, routes: Routes | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities (R, n), where there is a token (R, n), entropies (R, n); see `generate.answer_logp`."""


class ModelPolicy:
    """The unified model as a policy; prompts are samples."""

    def __init__(self, model: UniModel) -> None:
        self.module = model.eval().requires_grad_(True)
        for part in model.modules():
            if isinstance(part, MoE):
                part.bias.requires_grad_(False)

    def write(
        self, prompts: Sequence[Any], begun: Sequence[I64], *, limit: int, temperature: float, generator: torch.Generator,
        routes: bool,
    ) -> Written:  # fmt: skip
        return write(
            self.module, prompts, limit=limit, temperature=temperature, generator=generator, routes=routes, begun=begun
        )

    def answer_logp(
        self, prompts: Sequence[Any], answers: Sequence[I64], *, temperature: float, routes: Routes | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return answer_logp(self.module, prompts, answers, temperature=temperature, routes=routes)


def weights_of(module: nn.Module) -> dict[str, np.ndarray]:
    """A copy of the module's state, for other processes."""
    return {name: value.detach().cpu().numpy().copy() for name, value in module.state_dict().items()}


def put_weights(module: nn.Module, weights: Weights) -> None:
    """Give the module these weights."""
    module.load_state_dict({name: torch.tensor(value) for name, value in weights.items()})


def mismatched(
    weights: Weights, kind: Literal["none", "bf16", "router"], sigma: float, seed: int, version: int
) -> dict[str, np.ndarray]:
    """The weights that the rollout engine computes with.

    Args:
        kind: none: the same; bf16: rounded to bfloat16 (the computation stays float32); router: tensors whose name ends in
            `router` get Gaussian noise of `sigma` times their standard deviation, anew for each version.
    """
    if kind == "none":
        return dict(weights)
    found = {}
    for number, (name, value) in enumerate(weights.items()):
        tensor = torch.tensor(value)
        if kind == "bf16" and tensor.is_floating_point():
            tensor = tensor.bfloat16().to(tensor.dtype)
        elif kind == "router" and name.endswith("router"):
            noise = torch.randn(tensor.shape, generator=Seeds(seed).generator(Stream.ATTACK, number, version))
            tensor = tensor + sigma * tensor.std() * noise
        found[name] = tensor.numpy()
    return found
