"""Attacks on peer-to-peer networks: every neighbour may be told something else.

Attacks exist only in simulation. Source: specs/byzantine.md section 2.6; the messages go to honest neighbours only.

Shapes: n peers, h honest, d coordinates, b Byzantine neighbours of the receiver i.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from raysys.attacks.threat import HALF, Attack, PeerView, Threat, local_threat, receivers
from raysys.graph import Graph, fiedler_vector

LENGTHS = 6
FAR = 10.0


class PeerAttack(Attack):
    """An attack that has no message for a server."""

    def rows(self, honest: Tensor, threat: Threat) -> Tensor:
        raise ValueError(f"{self.name} speaks to peers one by one and has no message for a server")


class Dissensus(PeerAttack):
    """x_i - epsilon sum_{j in H} w_ij (x_j - x_i) / sum_{b in B} w_ib: the honest neighbours' pull, turned round.

    epsilon = 1 cancels plain gossip exactly: the honest models stay where they are. Source: He+ 2022 (2202.01545).
    """

    name = "dissensus"

    def __init__(self, epsilon: float = 1.0) -> None:
        self.epsilon = epsilon

    def craft_edges(
        self, models: Tensor, mixing: np.ndarray, byzantine: Sequence[int], threat: Threat
    ) -> dict[tuple[int, int], Tensor]:
        edges: dict[tuple[int, int], Tensor] = {}
        wide = models.float() if models.dtype in HALF else models
        for i, senders, honest in receivers(mixing, byzantine):
            share = np.asarray(mixing[i, honest[1:]], dtype=np.float64) / float(np.sum(mixing[i, senders]))
            pull = torch.as_tensor(share).to(wide) @ (wide[honest[1:]] - wide[i])
            message = (wide[i] - self.epsilon * pull).to(models.dtype)
            edges.update({(int(b), i): message.clone() for b in senders})
        return edges


class Push(PeerAttack):
    """Push each receiver as far as its rule lets one push, along a direction of its own.

    scale: length of the push in units of the receiver's longest honest difference, used when the rule is not known;
    when it is, the length with the largest displacement is chosen from the honest differences' lengths and a far one.
    """

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    @abstractmethod
    def directions(self, models: Tensor, honest: np.ndarray, edge: np.ndarray) -> Tensor:
        """(h, d) unit rows, or zero rows to leave a receiver alone; models (h, d), edge (h, h) of the honest graph."""

    def craft_edges(
        self, models: Tensor, mixing: np.ndarray, byzantine: Sequence[int], threat: Threat
    ) -> dict[tuple[int, int], Tensor]:
        bad = np.zeros(len(mixing), dtype=bool)
        bad[list(byzantine)] = True
        honest = np.flatnonzero(~bad)
        wide = models.float() if models.dtype in HALF else models
        edge = np.asarray(mixing)[np.ix_(honest, honest)] > 0
        np.fill_diagonal(edge, False)
        directions = self.directions(wide[honest], honest, edge)
        position = {int(i): k for k, i in enumerate(honest)}
        edges: dict[tuple[int, int], Tensor] = {}
        for i, senders, near in receivers(mixing, byzantine):
            local = local_threat(threat, models, mixing, i, near, senders)
            message = self._pushed(wide[near], directions[position[i]], local).to(models.dtype)
            edges.update({(int(b), i): message.clone() for b in senders})
        return edges

    def _pushed(self, near: Tensor, direction: Tensor, local: Threat) -> Tensor:
        own = near[0]
        lengths = torch.linalg.vector_norm(near[1:] - own, dim=1).sort().values
        longest = float(lengths[-1]) if len(lengths) else float(torch.linalg.vector_norm(own))
        if not isinstance(local.rule, PeerView):
            return own + self.scale * longest * direction
        picks = np.unique(np.linspace(0, max(len(lengths) - 1, 0), LENGTHS).round().astype(int))
        sizes = [float(lengths[k]) * (1 - 1e-6) for k in picks if len(lengths)] + [FAR * longest]
        reach = []
        for size in sizes:
            told = (own + size * direction).expand(local.f, -1)
            reach.append(float((local.rule(torch.cat([near, told])) - own) @ direction))
        return own + sizes[int(np.argmax(reach))] * direction


class Spectral(Push):
    """Push every peer along the slowest mode of the honest graph, so that what gossip contracts least grows back.

    The direction at i is sign(phi_i) sum_j phi_j x_j, normalised, phi the Fiedler vector of the honest graph.
    """

    name = "spectral"

    def directions(self, models: Tensor, honest: np.ndarray, edge: np.ndarray) -> Tensor:
        if len(models) < 2:
            return torch.zeros_like(models)
        phi = fiedler_vector(Graph(edge & edge.T))
        phi = np.where(np.abs(phi) < 1e-9, 0.0, phi)
        mode = torch.as_tensor(phi).to(models) @ (models - models.mean(0))
        return torch.outer(torch.as_tensor(np.sign(phi)).to(models), _unit(mode))


class Equivocation(Push):
    """Tell two camps opposite things: push every peer outwards along the main direction in which the models differ."""

    name = "equivocation"

    def directions(self, models: Tensor, honest: np.ndarray, edge: np.ndarray) -> Tensor:
        centred = models - models.mean(0)
        top = torch.linalg.eigh((centred @ centred.T).double()).eigenvectors[:, -1].to(models)
        axis = _unit(top @ centred)
        return torch.outer(torch.sign(centred @ axis), axis)


def _unit(vector: Tensor) -> Tensor:
    return vector / torch.linalg.vector_norm(vector).clamp_min(torch.finfo(vector.dtype).tiny)
