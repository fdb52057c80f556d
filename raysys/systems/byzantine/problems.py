"""The objectives that Byzantine-robust SGD is run on, each as a sum of local losses L_i over nodes.

Shapes: k nodes of a call, n nodes in all, b batch size, d parameters; theta (d,) shared by all nodes or (k, d), one each.

Notable choices
- A problem answers for any set of nodes at once (`gradients`), so that a host can step all its nodes in one batched pass.
- Batches are drawn with replacement by the stateless batch stream: node i's batch in round t is a function of (seed, i, t).
- Every local loss carries the same l2 term, so with a linear model the PL inequality holds with mu >= l2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from raysys.data import Dataset, Partition
from raysys.nn.batched import Model
from raysys.runtime.seeds import Seeds, Stream
from raysys.systems.byzantine.dissimilarity import PlantedQuadratics

Nodes = NDArray[np.int64]


class Problem(Protocol):
    """What an algorithm needs to know of an objective."""

    dimension: int

    def init(self) -> Tensor:
        """Common starting point (d,)."""

    def gradients(self, theta: Tensor, nodes: Nodes, round: int, step: int = 0) -> Tensor:
        """Stochastic gradients (k, d) of the nodes' own losses."""

    def full_gradients(self, theta: Tensor, nodes: Nodes) -> tuple[Tensor, Tensor]:
        """Exact local losses (k,) and gradients (k, d)."""

    def score(self, theta: Tensor) -> dict[str, float]:
        """What is reported of one model (d,): test accuracy and loss, or the distance to the optimum."""


@dataclass
class Classification:
    """Softmax cross-entropy (or squared loss on one-hot labels) of a model on partitioned real data.

    `flipped` nodes see the labels C-1-y: the data-level attack of Byzantine nodes (spec 2.6, no. 8).
    """

    model: Model
    data: Dataset
    partition: Partition
    batch: int
    l2: float
    seeds: Seeds
    squared: bool = False
    flipped: frozenset[int] = frozenset()
    device: str = "cpu"

    def __post_init__(self) -> None:
        self.dimension = self.model.dimension
        self.x = torch.from_numpy(self.data.train.x).to(self.device)
        self.y = torch.from_numpy(self.data.train.y).to(self.device)
        self.sizes = np.array([len(i) for i in self.partition.indices])
        # Rows of all nodes in one vector: node i's examples are order[start[i] : start[i] + sizes[i]].
        self.order = np.concatenate(self.partition.indices)
        self.start = np.concatenate([[0], np.cumsum(self.sizes)[:-1]])
        self.flip = np.zeros(len(self.sizes), dtype=bool)
        self.flip[list(self.flipped)] = True

    def init(self) -> Tensor:
        return self.model.init(self.seeds.generator(Stream.INIT))

    def _labels(self, rows: Tensor, nodes: Nodes) -> Tensor:
        y = self.y[rows]
        flip = self.flip[nodes]
        if flip.any():
            at = torch.from_numpy(flip).to(self.device).view(-1, *[1] * (y.dim() - 1))
            y = torch.where(at, self.data.classes - 1 - y, y)
        return y

    def _loss(self, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Regularised mean loss of each node: (k,)."""
        logits = self.model.logits(theta, x)
        if self.squared:
            fit = 0.5 * (logits - F.one_hot(y, self.data.classes)).square().sum(-1).mean(1)
        else:
            fit = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(y.shape).mean(1)
        return fit + 0.5 * self.l2 * theta.square().sum(1)

    def gradients(self, theta: Tensor, nodes: Nodes, round: int, step: int = 0) -> Tensor:
        # A local step is its own draw: rounds are spaced far apart in the stream's round counter.
        draw = self.seeds.integers(Stream.BATCH, nodes, round + (step << 40), self.batch, self.sizes[nodes])
        rows = torch.from_numpy(self.order[self.start[nodes][:, None] + draw]).to(self.device)
        leaf = theta.to(self.device).expand(len(nodes), -1).detach().clone().requires_grad_(True)
        loss = self._loss(leaf, self.x[rows], self._labels(rows, nodes)).sum()
        return torch.autograd.grad(loss, leaf)[0]

    def full_gradients(self, theta: Tensor, nodes: Nodes) -> tuple[Tensor, Tensor]:
        losses: list[Tensor] = []
        grads: list[Tensor] = []
        for node in nodes:  # local data sets differ in size, so this is a loop
            rows = torch.from_numpy(self.partition.indices[node]).to(self.device)[None]
            own = theta if theta.dim() == 1 else theta[len(losses)]
            leaf = own.to(self.device)[None].detach().clone().requires_grad_(True)
            loss = self._loss(leaf, self.x[rows], self._labels(rows, np.array([node])))
            losses.append(loss.detach())
            grads.append(torch.autograd.grad(loss.sum(), leaf)[0])
        return torch.cat(losses), torch.cat(grads)

    @torch.no_grad()
    def score(self, theta: Tensor) -> dict[str, float]:
        test = self.data.test
        theta = theta.to(self.device)[None]
        y = torch.from_numpy(test.y).to(self.device)
        logits = [
            self.model.logits(theta, torch.from_numpy(test.x[i : i + 2048]).to(self.device)[None])[0]
            for i in range(0, len(test), 2048)
        ]
        out = torch.cat(logits)
        return {
            "accuracy": float((out.argmax(1) == y).double().mean()),
            "test_loss": float(F.cross_entropy(out, y)),
        }


class Quadratics:
    """The planted (G, B) quadratics of `dissimilarity`, with Gaussian gradient noise E|xi|^2 = sigma^2.

    Honest nodes are 0..h-1; the others, Byzantine, have the honest average as their own gradient.
    """

    def __init__(self, planted: PlantedQuadratics, sigma: float, seeds: Seeds) -> None:
        self.planted, self.sigma, self.seeds = planted, sigma, seeds
        self.dimension = planted.Q.shape[0]

    def init(self) -> Tensor:
        return torch.from_numpy(self.seeds.rng(Stream.INIT).normal(size=self.dimension)).float()

    def full_gradients(self, theta: Tensor, nodes: Nodes) -> tuple[Tensor, Tensor]:
        p, x = self.planted, theta.double().numpy()
        honest = nodes < len(p.s)
        inside = np.where(honest, nodes, 0)
        scale = np.where(honest, 1 + p.B * p.s[inside], 1.0)
        pull = np.where(honest[:, None], p.G * p.u[inside], 0.0)
        bowl = x @ p.Q  # (d,) or (k, d); Q is symmetric
        losses = scale * 0.5 * (x * bowl).sum(-1) + (pull * x).sum(-1)
        return torch.from_numpy(losses), torch.from_numpy(scale[:, None] * bowl + pull).float()

    def gradients(self, theta: Tensor, nodes: Nodes, round: int, step: int = 0) -> Tensor:
        _, exact = self.full_gradients(theta, nodes)
        if self.sigma == 0:
            return exact
        u = self.seeds.uniform(Stream.BATCH, nodes, round + (step << 40), 2 * self.dimension)
        normal = np.sqrt(-2 * np.log1p(-u[:, : self.dimension])) * np.cos(
            2 * np.pi * u[:, self.dimension :]
        )  # Box-Muller
        return exact + torch.from_numpy(normal * self.sigma / np.sqrt(self.dimension)).float()

    def score(self, theta: Tensor) -> dict[str, float]:
        x = theta.double().numpy()
        return {"excess_loss": self.planted.loss(x), "distance": float(np.linalg.norm(x))}
