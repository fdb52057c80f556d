"""What an adversary knows, and the interface of an attack.

Attacks exist only in simulation: they need the honest vectors in-process, and nothing here opens a connection.

Notable choices
- Omniscient: an attack sees every honest row of the round. With local momentum those rows are the momenta, so an
  attack acts on momenta without knowing it.
- Honest rows that are not finite, or whose squares overflow (a run that diverges), are left out before the formulas;
  with none left the attack sends zeros.
- Half precision is computed in float32 and returned in its own type.

Shapes: n nodes, f Byzantine, h honest rows, d coordinates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from raysys.aggregation.neighbours import PeerRule

HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Threat:
    """The knowledge of the adversary in one round.

    rule: what the receiver aggregates with (a raysys Rule, a peer rule or any callable (n, d) -> (d,)), or None when
    unknown. reference: (d,) previous aggregate or None. own: (f, d) what the Byzantine nodes would honestly send, or
    None. rng: the attack stream of this round; equal generators give equal attacks. ids: (h,) who the honest rows are,
    where not all nodes take part in every round; None stands for 0..h-1.
    """

    n: int
    f: int
    round: int
    rng: np.random.Generator
    rule: Any = None
    reference: Tensor | None = None
    own: Tensor | None = None
    ids: np.ndarray | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.f <= self.n:
            raise ValueError(f"a threat needs 0 <= f <= n, got n={self.n}, f={self.f}")


@dataclass(frozen=True)
class PeerView:
    """A receiver's peer rule seen as a function of the stack (k, d): row 0 its own model, then what it receives.

    weights: (k - 1,) what the receiver gives to each of the rows after its own; b: its bound on Byzantine neighbours.
    """

    rule: PeerRule
    weights: np.ndarray
    b: int

    def __call__(self, stack: Tensor) -> Tensor:
        return self.rule.mix(stack[0], stack[1:], self.weights, self.b)


class Attack(ABC):
    """A strategy of the Byzantine nodes. Subclasses define `rows`; options are keyword arguments of their __init__."""

    name: ClassVar[str]
    data_level: ClassVar[bool] = False

    @property
    def uses_own(self) -> bool:
        """Whether `threat.own` is looked at; a caller may save the Byzantine nodes' own gradients where it is not."""
        return self.data_level

    @abstractmethod
    def rows(self, honest: Tensor, threat: Threat) -> Tensor:
        """(f, d), or (d,) when all Byzantine nodes send the same, from the finite honest rows (h, d), f > 0, h > 0."""

    def craft(self, honest: Tensor, threat: Threat) -> Tensor:
        """What the f Byzantine nodes send to a server: (f, d) in the type of `honest` (h, d)."""
        count, d = threat.f, honest.shape[1]
        if count == 0:
            return honest.new_zeros((0, d))
        wide = honest.float() if honest.dtype in HALF else honest
        usable = wide.square().sum(1) < torch.finfo(wide.dtype).max / (64 * max(len(wide), 1))
        if threat.ids is not None and len(threat.ids) != len(honest):
            raise ValueError(f"threat.ids names each honest row, got {len(threat.ids)} ids for {len(honest)} rows")
        if not usable.all():
            names = np.arange(len(wide)) if threat.ids is None else np.asarray(threat.ids)
            threat = replace(threat, ids=names[usable.cpu().numpy()])
            wide = wide[usable]
        if not len(wide):
            return honest.new_zeros((count, d))
        rows = self.rows(wide, threat)
        return rows.expand(count, d).to(honest.dtype).clone()

    def craft_edges(
        self, models: Tensor, mixing: np.ndarray, byzantine: Sequence[int], threat: Threat
    ) -> dict[tuple[int, int], Tensor]:
        """What each Byzantine peer sends to each honest neighbour: {(sender, receiver): (d,)}.

        models: (n, d), Byzantine rows hold what those peers would honestly send. mixing: (n, n), row i the weights of
        receiver i; off-diagonal entries > 0 are the edges. By default every receiver is attacked as a server whose
        honest rows are its own model and its honest neighbours'.
        """
        edges: dict[tuple[int, int], Tensor] = {}
        for i, senders, honest in receivers(mixing, byzantine):
            rows = self.craft(models[honest], local_threat(threat, models, mixing, i, honest, senders))
            edges.update({(int(j), i): rows[k] for k, j in enumerate(senders)})
        return edges

    def state_dict(self) -> dict[str, Tensor]:
        """Named tensors that the next round depends on."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if state:
            raise ValueError(f"{self.name} keeps no state, got {sorted(state)}")

    def reset(self) -> None:
        """Forget everything learned in earlier rounds."""
        return

    def __repr__(self) -> str:
        options = ", ".join(f"{k}={v!r}" for k, v in vars(self).items() if not k.startswith("_"))
        return f"{self.name}({options})"


class CustomAttack(Attack):
    """A user's own function (honest (h, d), threat) -> (f, d) or (d,)."""

    name = "custom"
    uses_own = True

    def __init__(self, function: Callable[[Tensor, Threat], Tensor], label: str) -> None:
        self.label = label
        self._function = function

    def rows(self, honest: Tensor, threat: Threat) -> Tensor:
        rows = self._function(honest, threat)
        fits = isinstance(rows, Tensor) and tuple(rows.shape) in {(threat.f, honest.shape[1]), (honest.shape[1],)}
        if not fits:
            got = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
            raise ValueError(f"attack {self.label} must return a ({threat.f}, {honest.shape[1]}) tensor, got {got}")
        return rows


def receivers(mixing: np.ndarray, byzantine: Sequence[int]) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """(i, its Byzantine neighbours, itself followed by its honest neighbours) for each honest i with any of the first."""
    bad = np.zeros(len(mixing), dtype=bool)
    bad[list(byzantine)] = True
    edge = np.asarray(mixing) > 0
    np.fill_diagonal(edge, False)
    found = []
    for i in np.flatnonzero(~bad):
        senders = np.flatnonzero(edge[i] & bad)
        if len(senders):
            found.append((int(i), senders, np.concatenate([[i], np.flatnonzero(edge[i] & ~bad)])))
    return found


def local_threat(
    threat: Threat, models: Tensor, mixing: np.ndarray, i: int, honest: np.ndarray, senders: np.ndarray
) -> Threat:
    """What receiver i faces: its neighbourhood as n, its Byzantine neighbours as f, its model as the reference."""
    rule = threat.rule
    if isinstance(rule, PeerRule):
        rule = PeerView(rule, np.asarray(mixing)[i, np.concatenate([honest[1:], senders])], len(senders))
    return replace(
        threat,
        n=len(honest) + len(senders),
        f=len(senders),
        rule=rule,
        own=models[senders],
        reference=models[i],
        ids=honest,
    )
