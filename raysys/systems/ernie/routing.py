"""Which experts serve which task: usage by layer, normalised entropy, shared experts (Section 6.4.1, figures 8 to 10).

Shapes: L layers, E experts, k active ones, N tokens of a task.

Notable choices
- A task's tokens are those of its own modality: visual tokens of images to be drawn, look tokens of images to be understood, and
  so on. Captions and special tokens are not among them, since text would make all tasks look alike.
- Every task is measured on the same number of tokens: entropy and overlap of small samples are biased.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from raysys.nn.balance import max_violation, normalized_entropy, top_overlap
from raysys.systems.ernie.batch import Batch
from raysys.systems.ernie.model import UniModel
from raysys.systems.ernie.stream import TASKS, Kind

STREAMS = {
    "text": ("lm", Kind.TEXT),
    "image understanding": ("i2t", Kind.LOOK),
    "video understanding": ("v2t", Kind.LOOK),
    "audio understanding": ("a2t", Kind.AUDIO),
    "image generation": ("t2i", Kind.VISUAL),
    "video generation": ("t2v", Kind.VISUAL),
    "audio generation": ("t2a", Kind.AUDIO),
}
"""What is told apart: the task and the kind of its own tokens."""


@torch.no_grad()
def choices(model: UniModel, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """The experts (N, L, k) of the tokens of each stream that the batches have, whole model."""
    found: dict[str, list[Tensor]] = {name: [] for name in STREAMS}
    for batch in batches:
        out = model(batch)
        valid = batch.valid
        task, kind = batch.task[valid], batch.kind[valid]
        every = torch.stack([told.experts for _, told in out.routed], 1)  # (N, L, k), in the order of places
        for name, (which, sort) in STREAMS.items():
            found[name].append(every[(task == TASKS.index(which)) & (kind == sort)])
    joined = {name: torch.cat(parts) for name, parts in found.items() if parts}
    return {name: parts for name, parts in joined.items() if len(parts)}


def usage(chosen: dict[str, Tensor], experts: int) -> dict[str, Tensor]:
    """Assignments (L, E) of each stream, over equally many tokens of each, the first ones."""
    count = min(len(parts) for parts in chosen.values())
    return {
        name: torch.stack([torch.bincount(layer.flatten(), minlength=experts) for layer in parts[:count].unbind(1)])
        for name, parts in chosen.items()
    }


@torch.no_grad()
def loads(model: UniModel, batches: Iterable[Batch]) -> Tensor:
    """(L, E): assignments of all tokens, captions and special ones included, whole model."""
    total = torch.zeros(model.setting.layers, model.setting.experts, dtype=torch.int64)
    for batch in batches:
        for layer, (_, told) in enumerate(model(batch).routed):
            total[layer] += torch.bincount(told.experts.flatten(), minlength=model.setting.experts)
    return total


def report(counts: dict[str, Tensor], load: Tensor) -> dict[str, dict[str, list[float]]]:
    """By stream and layer the normalised entropy; by pair of streams and layer the IoU of the most used quarter of experts; and
    by layer the largest load above the mean ("max violation") of `load` (L, E), which is what the balance is about."""
    names = list(counts)
    entropy = {name: normalized_entropy(c).tolist() for name, c in counts.items()}
    overlap = {
        f"{a} | {b}": [top_overlap(x, y) for x, y in zip(counts[a], counts[b], strict=True)]
        for i, a in enumerate(names)
        for b in names[i + 1 :]
    }
    return {"entropy": entropy, "overlap": overlap, "violation": {"all": max_violation(load).tolist()}}
