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
        leaf = theta.expand(len(nodes), -1).detach().clone().requires_grad_(True)
        loss = self._loss(leaf, self.x[rows], self._labels(rows, nodes)).sum()
        return torch.autograd.grad(loss, leaf)[0]

    def full_gradients(self, theta: Tensor, nodes: Nodes) -> tuple[Tensor, Tensor]:
        losses: list[Tensor] = []
        grads: list[Tensor] = []
        for node in nodes:  # local data sets differ in size, so this is a loop
            rows = torch.from_numpy(self.partition.indices[node]).to(self.device)[None]
            own = theta if theta.dim() == 1 else theta[len(losses)]
            leaf = own[None].detach().clone().requires_grad_(True)
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


@dataclass
class Quadratics:
    """Heterogeneous quadratics L_i = (a_i/2) |theta - c_i|^2 in d dimensions, optionally with Gaussian gradient noise.

    `curvature` (n,) and `centres` (n, d) plant the heterogeneity: with equal curvatures B = 0 and G^2 is the variance of
    a*c_i over honest nodes; `honest` are the nodes that define the global objective.
    """

    curvature: NDArray[np.float64]
    centres: NDArray[np.float64]
    honest: Nodes
    sigma: float
    seeds: Seeds

    def __post_init__(self) -> None:
        self.dimension = self.centres.shape[1]
        weight = self.curvature[self.honest]
        self.optimum = (weight[:, None] * self.centres[self.honest]).sum(0) / weight.sum()
        self.mu = float(weight.mean())

    def init(self) -> Tensor:
        rng = self.seeds.rng(Stream.INIT)
        return torch.from_numpy(self.optimum + rng.normal(size=self.dimension)).float()

    def full_gradients(self, theta: Tensor, nodes: Nodes) -> tuple[Tensor, Tensor]:
        a = torch.from_numpy(self.curvature[nodes])[:, None]
        gap = theta.double() - torch.from_numpy(self.centres[nodes])
        return (0.5 * a * gap.square()).sum(1), (a * gap).float()

    def gradients(self, theta: Tensor, nodes: Nodes, round: int, step: int = 0) -> Tensor:
        _, exact = self.full_gradients(theta, nodes)
        if self.sigma == 0:
            return exact
        u = self.seeds.uniform(Stream.BATCH, nodes, round + (step << 40), 2 * self.dimension)
        # Box-Muller; |xi|^2 has expectation sigma^2 over all d coordinates.
        r = np.sqrt(-2 * np.log1p(-u[:, : self.dimension]))
        noise = r * np.cos(2 * np.pi * u[:, self.dimension :]) * self.sigma / np.sqrt(self.dimension)
        return exact + torch.from_numpy(noise).float()

    def score(self, theta: Tensor) -> dict[str, float]:
        gap = theta.double().numpy() - self.optimum
        return {"excess_loss": float(0.5 * self.mu * (gap @ gap)), "distance": float(np.linalg.norm(gap))}


def planted_quadratics(
    n: int, honest: Nodes, dimension: int, g: float, b: float, sigma: float, seeds: Seeds
) -> Quadratics:
    """Quadratics whose honest nodes satisfy (G, B)-dissimilarity with equality at the optimum's gradient scale.

    Curvatures are mu*(1 + B*s_i) with s_i = +-1 balanced over honest nodes, so their gradients' spread grows as
    B^2 |grad L|^2 exactly; centres are drawn orthogonal to that pattern and scaled so that the spread at the optimum is
    G^2 (spec 2.1). mu = 1.

    Raises:
        ValueError: B >= 1 would make a local loss concave; fewer than 2 honest nodes with G or B positive.
    """
    h = len(honest)
    if h < 2 and (g > 0 or b > 0):
        raise ValueError(f"workers: {h} honest node(s) cannot differ; G and B must be 0")
    rng = seeds.rng(Stream.PARTITION)
    sign = np.where(np.arange(h) % 2 == 0, 1.0, -1.0)
    sign -= sign.mean()
    scale = np.sqrt((sign**2).mean()) if h > 1 else 1.0
    curvature = np.ones(n)
    curvature[honest] = 1 + b * sign / scale
    if curvature.min() <= 0:
        raise ValueError(
            f"dissimilarity_b: got {b}; these quadratics need it below {scale / np.abs(sign).max():.3g} to stay convex"
        )
    # Offsets e_i = a_i c_i: mean zero and uncorrelated with the curvatures, so the cross term of the spread vanishes.
    offsets = rng.normal(size=(h, dimension))
    basis, _ = np.linalg.qr(np.stack([np.ones(h), sign], 1) if b > 0 and h > 2 else np.ones((h, 1)))
    offsets -= basis @ (basis.T @ offsets)
    norm = np.sqrt((offsets**2).sum(1).mean())
    offsets *= g / norm if norm > 0 else 0.0
    centres = np.zeros((n, dimension))
    centres[honest] = offsets / curvature[honest, None]
    return Quadratics(curvature, centres, honest, sigma, seeds)
