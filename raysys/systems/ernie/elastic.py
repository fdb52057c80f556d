"""Sub-models of one set of weights: sampled in training, chosen for use, cut out as models of their own (Section 3.3).

Shapes: R rows of a batch, L layers, E experts, k active ones, Q code levels.

Notable choices
- A row of a packed batch is the paper's training instance: it draws depth, width and sparsity by itself.
- Reduced depth passes over middle layers: never the first (Figure 4), and never the last Q, in which audio codes are predicted
  one after the other (INFERRED; the paper keeps the last layer).
- Rows that use all experts and all k count for the balance; restricted rows would bias it.
- A sub-model is a view: masks on the same weights. `cut` copies what it uses into a model of its own, equal to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raysys.systems.ernie.setting import ElasticSetting, ModelSetting


@dataclass(frozen=True)
class Elastic:
    """What each row uses: layers (R, L) bool, active experts (R,), and allowed experts (L, R, E) bool or None for all."""

    keep: Tensor
    active: Tensor
    allowed: Tensor | None

    def counted(self, k: int) -> Tensor:
        """(R,) bool: rows that use all experts and all k."""
        whole = self.active == k
        return whole if self.allowed is None else whole & self.allowed.all(-1).all(0)


@dataclass(frozen=True)
class SubModel:
    """A sub-model: which layers, which experts of each of them (None for all), how many active."""

    layers: tuple[int, ...]
    active: int
    experts: tuple[tuple[int, ...], ...] | None = None

    @classmethod
    def full(cls, setting: ModelSetting) -> SubModel:
        return cls(tuple(range(setting.layers)), setting.active)

    def check(self, setting: ModelSetting, levels: int) -> None:
        """Raises ValueError where it is no sub-model of `setting`."""
        order = list(self.layers)
        needed = {0, *range(setting.layers - levels, setting.layers)}
        if order != sorted(set(order)) or not set(order) <= set(range(setting.layers)) or not needed <= set(order):
            raise ValueError(
                f"layers: got {order}; expected an increasing choice of 0..{setting.layers - 1} with {sorted(needed)}"
            )
        if not 1 <= self.active <= setting.active:
            raise ValueError(f"active: got {self.active}; expected 1 to {setting.active}")
        if self.experts is not None:
            sizes = {len(chosen) for chosen in self.experts}
            inside = all(
                sorted(set(c)) == list(c) and c and c[-1] < setting.experts and c[0] >= 0 for c in self.experts
            )
            if len(self.experts) != len(order) or len(sizes) != 1 or not inside:
                raise ValueError("experts: expected, for each layer, equally many increasing experts")
            if self.active > sizes.pop():
                raise ValueError(f"active: got {self.active}, more than the experts of a layer")

    def rows(self, count: int, setting: ModelSetting, device: str = "cpu") -> Elastic:
        """The view of it for `count` rows."""
        keep = torch.zeros(count, setting.layers, dtype=torch.bool, device=device)
        keep[:, list(self.layers)] = True
        active = torch.full((count,), self.active, dtype=torch.int64, device=device)
        if self.experts is None:
            return Elastic(keep, active, None)
        allowed = torch.ones(setting.layers, count, setting.experts, dtype=torch.bool, device=device)
        for layer, chosen in zip(self.layers, self.experts, strict=True):
            allowed[layer] = False
            allowed[layer][:, list(chosen)] = True
        return Elastic(keep, active, allowed)


def sample(
    rows: int, setting: ModelSetting, levels: int, elastic: ElasticSetting, generator: torch.Generator
) -> Elastic | None:
    """Draw a sub-model for each row; None where elastic training is off."""
    if elastic.off:
        return None
    L, E, k = setting.layers, setting.experts, setting.active
    draw = torch.rand(3, rows, generator=generator)
    keep = torch.ones(rows, L, dtype=torch.bool)
    middle = L - 1 - levels
    for r in torch.nonzero(draw[0] < elastic.depth).flatten().tolist() if middle > 0 else []:
        dropped = int(torch.randint(1, middle + 1, (), generator=generator))
        keep[r, 1 + torch.randperm(middle, generator=generator)[:dropped]] = False
    allowed = torch.ones(rows, E, dtype=torch.bool)
    size = max(k, round(elastic.share * E))
    for r in torch.nonzero(draw[1] < elastic.width).flatten().tolist():
        allowed[r] = False
        allowed[r, torch.randperm(E, generator=generator)[:size]] = True
    active = torch.full((rows,), k)
    fewer = draw[2] < elastic.sparsity
    if k > 1:
        active[fewer] = torch.randint(1, k, (int(fewer.sum()),), generator=generator)
    return Elastic(keep, active, None if bool(allowed.all()) else allowed.expand(L, rows, E))


def by_usage(counts: Tensor, share: float, layers: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """For each of `layers` the most used `share` of experts, by counts (L, E) on a calibration set (INFERRED: which experts an
    exported sub-model keeps is not in the paper). Ties go to lower numbers."""
    size = max(1, round(share * counts.shape[1]))
    order = torch.argsort(counts, dim=1, descending=True, stable=True)[:, :size]
    return tuple(tuple(sorted(order[layer].tolist())) for layer in layers)
