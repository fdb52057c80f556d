"""Attacks built against one kind of rule: mirror worlds, hidden vulnerability, relocated orthogonal perturbation.

Attacks exist only in simulation. Source: specs/byzantine.md section 2.6, items 12 to 14.

Shapes: h honest rows, f Byzantine, d coordinates.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from raysys.attacks.distance import mirror_groups
from raysys.attacks.response import Response, line_search
from raysys.attacks.threat import Attack, Threat


class Mirror(Attack):
    """The lower bound's world: the f honest rows that stick out most get f mirror images across the rest.

    The honest deviations' main direction is found; of its two ends the f rows farther from the mean of the others are
    the group C, the others A, and Byzantine k sends 2 mean(A) - C_k. A rule that treats rows alike then leans to
    mean(A), and cannot know that C was honest (specs/byzantine.md section 2.4).
    """

    name = "mirror"

    def rows(self, honest: Tensor, threat: Threat) -> Tensor:
        deviations = honest - honest.mean(0)
        chosen, rest = mirror_groups((deviations @ deviations.T).double().cpu().numpy(), threat.f)
        if not len(chosen):
            return honest[0]
        images = 2.0 * honest[torch.from_numpy(rest)].mean(0) - honest[torch.from_numpy(chosen.copy())]
        return images[torch.arange(threat.f) % len(chosen)]


class Hidden(Attack):
    """Hidden vulnerability: all honest but for one coordinate, pushed as far as the rule still follows.

    The coordinate with the largest honest spread, against the mean's sign there; the size is line-searched for the
    largest move of the output along it. Source: El Mhamdi+ 2018 (1802.07927).
    """

    name = "hidden"
    GRID = 14

    def __init__(self, refine: int = 4) -> None:
        self.refine = refine

    def rows(self, honest: Tensor, threat: Threat) -> Tensor:
        spread, mean = honest.std(0, correction=0), honest.mean(0)
        at = int(spread.argmax())
        axis = torch.zeros_like(mean)
        axis[at] = -1.0 if float(mean[at]) >= 0 else 1.0
        unit = np.zeros(len(honest) + 1)
        unit[-1] = 1.0
        response = Response(honest, axis[None], threat, self.name, probe=unit, columns=None)
        largest = 4.0 * float(torch.linalg.vector_norm(honest - mean, dim=1).max())
        if largest == 0.0:
            return mean
        grid = tuple(largest * 2.0**-k for k in reversed(range(self.GRID)))
        size = line_search(lambda t: response(response.mean + t * unit)[1], grid, self.refine)
        return response.combine(response.mean + size * unit)


class Rop(Attack):
    """Relocated orthogonal perturbation: beside the clipping centre, across the honest direction.

    centre = relocate * previous aggregate + (1 - relocate) mu (mu when there is none); the row is centre + z r q with q
    the unit part of -sign(mu) orthogonal to the centre and r the median honest distance to it: clipping around the
    previous aggregate keeps such a row whole. Source: Ozfatura+ 2023 (2208.09894).
    """

    name = "rop"

    def __init__(self, z: float = 1.0, relocate: float = 0.9) -> None:
        if not 0.0 <= relocate <= 1.0:
            raise ValueError(f"rop needs 0 <= relocate <= 1, got {relocate}")
        self.z, self.relocate = z, relocate

    def rows(self, honest: Tensor, threat: Threat) -> Tensor:
        mean = honest.mean(0)
        centre = mean if threat.reference is None else torch.lerp(mean, threat.reference.to(mean), self.relocate)
        across = -torch.sign(mean)
        size = centre @ centre
        if size > 0:
            across = across - (across @ centre) / size * centre
        length = torch.linalg.vector_norm(across)
        if length == 0:
            return centre
        radius = torch.linalg.vector_norm(honest - centre, dim=1).median()
        return centre + self.z * radius * across / length
