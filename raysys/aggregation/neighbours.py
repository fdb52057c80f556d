"""Rules of peer-to-peer networks: a peer mixes its own model with what its neighbours send.

Notable choices
- One form for all: x+ = x + sum_j w_j F(z_j), z_j = x_j - x; weights come from a mixing matrix, so with b = 0 (or no
  clipping active) clip_2b, clipped_gossip and nna are plain gossip and keep the average exactly.
- Only differences to the own model enter, never products of models: no cancellation at a common offset.
- A neighbour's vector with NaN or infinity counts as not received: its weight stays with the own model and b, the
  bound on Byzantine neighbours, is lowered by one.

Shapes: k neighbours, d coordinates, z (k, d) differences. Source: specs/byzantine.md section 2.7 unless said.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raysys.aggregation.registry import checked, make_rule, parse_item
from raysys.aggregation.user import load

Weights = NDArray[np.float64]
HALF = (torch.float16, torch.bfloat16)


class PeerRule(ABC):
    """How a peer mixes. Subclasses define `combine` on finite rows."""

    name: ClassVar[str]
    rho: ClassVar[float | None] = None  # ||F(z) - sum_H z_j||^2 <= rho b sum_H ||z_j||^2, None when no such bound

    pulls: int | None = None
    """How many neighbours a peer hears in a round, drawn anew each time; None: all of them."""

    @abstractmethod
    def combine(self, own: Tensor, neighbours: Tensor, weights: Weights, b: int) -> Tensor:
        """The mixed model (d,) from finite rows; k may be 0 only where `requires` allows it."""

    def requires(self, k: int, b: int) -> None:
        """ValueError when k neighbours are too few for b Byzantine ones, or b is negative."""
        if b < 0:
            raise ValueError(f"{self.name} needs b >= 0 Byzantine neighbours, got {b}")

    def mix(self, own: Tensor, neighbours: Tensor, weights: Weights, b: int) -> Tensor:
        """The model after one exchange: (d,) in the type of `own` (d,), from neighbours (k, d) and weights (k,).

        b: how many of the k may be Byzantine. ValueError for wrong shapes, weights that are negative or sum above 1,
        or too few neighbours.
        """
        weights = np.asarray(weights, dtype=np.float64)
        if neighbours.shape[1:] != own.shape or weights.shape != (len(neighbours),):
            raise ValueError(
                f"{self.name} needs k vectors and k weights for a model of {tuple(own.shape)}, "
                f"got {tuple(neighbours.shape)} and {weights.shape}"
            )
        if (weights < 0).any() or weights.sum() > 1 + 1e-9:
            raise ValueError(
                f"{self.name} needs weights >= 0 with a sum of at most 1, got a sum of {weights.sum():.6g}"
            )
        finite = torch.isfinite(neighbours).all(1)
        rejected = len(finite) - int(finite.sum())
        if rejected:
            neighbours, weights, b = (
                neighbours[finite],
                weights[finite.cpu().numpy()],
                max(b - rejected, 0) if b > 0 else b,
            )
        self.requires(len(neighbours), b)
        if not len(neighbours):
            return own.clone()
        wide = torch.float32 if own.dtype in HALF else own.dtype
        return self.combine(own.to(wide), neighbours.to(wide), weights, b).to(own.dtype)

    def __repr__(self) -> str:
        options = ", ".join(f"{k}={v!r}" for k, v in vars(self).items() if not k.startswith("_"))
        return f"{self.name}({options})"


def _step(own: Tensor, z: Tensor, share: Weights) -> Tensor:
    """own + sum_j share_j z_j."""
    return own + torch.as_tensor(share, dtype=own.dtype, device=own.device) @ z


def _lengths(z: Tensor) -> Weights:
    return torch.linalg.vector_norm(z, dim=1).double().cpu().numpy()


def _clipped(own: Tensor, z: Tensor, weights: Weights, lengths: Weights, tau: float) -> Tensor:
    """One step with differences cut to length tau; lengths that are not above tau stay exactly as they are."""
    return _step(own, z, weights * np.where(lengths > tau, tau / np.where(lengths > tau, lengths, 1.0), 1.0))


class Gossip(PeerRule):
    """Plain gossip: the weighted mean. Any Byzantine neighbour moves it anywhere."""

    name = "gossip"

    def combine(self, own: Tensor, neighbours: Tensor, weights: Weights, b: int) -> Tensor:
        return _step(own, neighbours - own, weights)


class Clip2b(PeerRule):
    """Clip all differences to the (2b)-th largest length; with fewer than 2b neighbours the peer keeps its model.

    Needs no oracle. Contracts for small weights when 2 rho b < mu_2 of the honest graph, and breaks where every rule
    must, at 2b = mu_2. After CS+ of Gaucher+ 2025 (2410.10418).
    """

    name = "clip_2b"
    rho = 2.0

    def combine(self, own: Tensor, neighbours: Tensor, weights: Weights, b: int) -> Tensor:
        z = neighbours - own
        if b == 0:
            return _step(own, z, weights)
        lengths = _lengths(z)
        tau = float(np.sort(lengths)[-2 * b]) if 2 * b <= len(z) else 0.0
        return _clipped(own, z, weights, lengths, tau)


class ClippedGossip(PeerRule):
    """Clip differences to a radius, He+ 2022 (2202.01545): tau_i^2 = sum_{j in H} w_ij ||x_i - x_j||^2 / delta_i.

    H is not known to a peer: without `tau` the b longest differences stand in for the Byzantine ones and delta_i is
    the weight of the b heaviest neighbours. With `tau` the radius is that number (an oracle's, in the theory tests).
    """

    name = "clipped_gossip"
    rho = 1.5625  # with the oracle radius

    def __init__(self, tau: float | None = None) -> None:
        if tau is not None and tau < 0:
            raise ValueError(f"clipped_gossip needs tau >= 0, got {tau}")
        self.tau = tau

    def combine(self, own: Tensor, neighbours: Tensor, weights: Weights, b: int) -> Tensor:
        z = neighbours - own
        lengths = _lengths(z)
        tau = self.tau
        if tau is None:
            delta = float(np.sort(weights)[::-1][:b].sum())
            kept = np.argsort(lengths, kind="stable")[: max(len(z) - b, 0)]
            tau = float(np.sqrt((weights[kept] * lengths[kept] ** 2).sum() / delta)) if delta > 0 else np.inf
        return _clipped(own, z, weights, lengths, tau)


class NearestNeighbours(PeerRule):
    """NNA in weighted form: drop the b longest differences, gossip with the rest."""

    name = "nna"
    rho: ClassVar[float | None] = 4.0

    def requires(self, k: int, b: int) -> None:
        super().requires(k, b)
        if b > k:
            raise ValueError(f"{self.name} needs at least b neighbours, got k={k}, b={b}")

    def combine(self, own: Tensor, neighbours: Tensor, weights: Weights, b: int) -> Tensor:
        z = neighbours - own
        far = np.argsort(_lengths(z), kind="stable")[len(z) - b :]
        share = weights.copy()
        share[far] = 0.0
        return _step(own, z, share)


class Monna(NearestNeighbours):
    """MoNNA's averaging step: the plain mean of the k + 1 - b models nearest to the own one, itself among them.

    Source: Farhadkhani+ 2023 (2209.10931). Weights are not used.
    """

    name = "monna"
    rho = None

    def combine(self, own: Tensor, neighbours: Tensor, weights: Weights, b: int) -> Tensor:
        z = neighbours - own
        share = np.full(len(z), 1.0 / (len(z) + 1 - b))
        share[np.argsort(_lengths(z), kind="stable")[len(z) - b :]] = 0.0
        return _step(own, z, share)


class Bridge(PeerRule):
    """BRIDGE-T: per coordinate drop the b largest and b smallest neighbours, average the rest with the own value.

    Source: Fang+ 2022 (1908.08098). Weights are not used.
    """

    name = "bridge"

    def requires(self, k: int, b: int) -> None:
        super().requires(k, b)
        if b and k < 2 * b + 1:
            raise ValueError(f"bridge needs at least 2b + 1 neighbours, got k={k}, b={b}")

    def combine(self, own: Tensor, neighbours: Tensor, weights: Weights, b: int) -> Tensor:
        k = len(neighbours)
        middle = (neighbours - own).sort(dim=0).values[b : k - b]
        return own + middle.sum(0) / (len(middle) + 1)


class Ios(PeerRule):
    """Iterative outlier scissor: b times drop the model farthest from the weighted mean, never the own one.

    Source: Wu+ 2023 (2201.07434).
    """

    name = "ios"

    def requires(self, k: int, b: int) -> None:
        super().requires(k, b)
        if b > k:
            raise ValueError(f"ios needs at least b neighbours, got k={k}, b={b}")

    def combine(self, own: Tensor, neighbours: Tensor, weights: Weights, b: int) -> Tensor:
        z = neighbours - own
        keep = np.ones(len(z), dtype=bool)
        own_weight = 1.0 - weights.sum()
        for _ in range(b):
            mean = _step(torch.zeros_like(own), z, weights * keep / max(own_weight + weights[keep].sum(), 1e-300))
            distance = np.where(keep, _lengths(z - mean), -1.0)
            keep[int(distance.argmax())] = False
        return _step(own, z, weights * keep / max(own_weight + weights[keep].sum(), 1e-300))


class CustomPeerRule(PeerRule):
    """A user's own function (own, neighbours, weights, b) -> (d,)."""

    name = "custom"

    def __init__(self, function: Callable[[Tensor, Tensor, Weights, int], Tensor], label: str) -> None:
        self.label = label
        self._function = function

    def combine(self, own: Tensor, neighbours: Tensor, weights: Weights, b: int) -> Tensor:
        mixed = self._function(own, neighbours, weights, b)
        if not isinstance(mixed, Tensor) or mixed.shape != own.shape:
            got = tuple(mixed.shape) if isinstance(mixed, Tensor) else type(mixed).__name__
            raise ValueError(f"peer rule {self.label} must return a tensor of shape {tuple(own.shape)}, got {got}")
        return mixed


class Rpel(PeerRule):
    """RPEL: a server rule on the own model and on those pulled from `pulls` random peers, anew every round.

    The caller draws the peers; b is b-hat, the number of Byzantine ones among the pulled that is not exceeded in the whole
    run but with small probability (systems/byzantine/theory.rpel_b_hat). Messages n * pulls instead of n^2. Weights are
    not used. Source: El Mrini+ 2025 (2510.08311), spec 2.7.
    """

    name = "rpel"

    def __init__(self, pulls: int = 15, rule: str = "nnm+trimmed_mean") -> None:
        if pulls < 1:
            raise ValueError(f"rpel needs at least one pull, got pulls={pulls}")
        make_rule(rule, 50, 1)  # a wrong name is told now, not in the first round
        self.pulls, self.rule = pulls, rule

    def requires(self, k: int, b: int) -> None:
        super().requires(k, b)
        make_rule(self.rule, k + 1, b)

    def combine(self, own: Tensor, neighbours: Tensor, weights: Weights, b: int) -> Tensor:
        z = torch.cat(
            [torch.zeros_like(own)[None], neighbours - own]
        )  # differences: no cancellation at a common offset
        return own + make_rule(self.rule, len(z), b)(z)


PEER_RULES: dict[str, type[PeerRule]] = {
    rule.name: rule for rule in (Gossip, Clip2b, ClippedGossip, NearestNeighbours, Monna, Bridge, Ios, Rpel)
}


def make_peer_rule(spec: str = "clip_2b") -> PeerRule:
    """The peer rule `spec` names: `name`, `name(key=value)` or `module:function` (own, neighbours, weights, b) -> (d,).

    ValueError for an unknown name or option.
    """
    if ":" in spec:
        return CustomPeerRule(load(spec), spec)
    name, options = parse_item(spec)
    if name not in PEER_RULES:
        raise ValueError(f"unknown peer rule {name!r}, the peer rules are {', '.join(sorted(PEER_RULES))}")
    return PEER_RULES[name](**checked(f"peer rule {name}", PEER_RULES[name], options))
