"""Items through the tokenizers: what the backbone reads and predicts.

Notable choices
- Items go through a tokenizer in batches counted from the first one, on one thread if bits matter: a convolution's last bits may
  depend on how many it works on at once.
- A piece of a longer text does not end where the piece does, so nothing says <eos> after it; captions end.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import safetensors.torch
import torch

from raysys.data.multimodal import Item
from raysys.systems.ernie.stream import Audio, Look, Sample, Segment, Text, Vision
from raysys.systems.ernie.tokenizers.audio import AudioCodec
from raysys.systems.ernie.tokenizers.text import TextTokenizer
from raysys.systems.ernie.tokenizers.visual import VisualTokenizer

BATCH = 64
"""Items that go through a tokenizer at once."""


class Codecs(Protocol):
    """Trained tokenizers."""

    @property
    def text(self) -> TextTokenizer: ...
    @property
    def visual(self) -> VisualTokenizer: ...
    @property
    def audio(self) -> AudioCodec: ...


def samples_of(codecs: Codecs, items: Sequence[Item], given: int | None = None) -> list[Sample]:
    """Items of one task as samples.

    Args:
        given: frames of a video that are context without loss (t2v); by default the first half.

    Raises:
        ValueError: items are of several tasks, or lack what their task is made from.
    """
    if not items:
        return []
    task = items[0].task
    if any(item.task != task for item in items):
        raise ValueError(f"items are of one task at a time, got {sorted({item.task for item in items})}")
    words = [codecs.text.encode(item.text) for item in items]
    if task == "lm":
        return [Sample(task, (Text(ids, True, closed=False),)) for ids in words]
    others: list[Segment] = []
    for start in range(0, len(items), BATCH):
        part = items[start : start + BATCH]
        if task in ("t2i", "t2v"):
            others += _vision(codecs.visual, part, given)
        elif task in ("i2t", "v2t"):
            others += _look(codecs.visual, part)
        else:
            others += _audio(codecs.audio, part, predicted=task == "t2a")
    if task.startswith("t2"):
        return [Sample(task, (Text(ids, False), other)) for ids, other in zip(words, others, strict=True)]
    return [Sample(task, (other, Text(ids, True))) for ids, other in zip(words, others, strict=True)]


def fingerprint(codecs: Codecs) -> str:
    """SHA-256 of all that tokenizers depend on."""
    digest = hashlib.sha256(codecs.text.to_bytes())
    for module in (codecs.visual, codecs.audio):
        digest.update(json.dumps(module.config, sort_keys=True).encode())
        state = {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}
        digest.update(safetensors.torch.save(state))
    return digest.hexdigest()


@torch.no_grad()
def _vision(codec: VisualTokenizer, items: Sequence[Item], given: int | None) -> list[Segment]:
    frames = _stacked(items, "frames")
    latents = codec.encode(frames).numpy()
    known = latents.shape[1] // 2 if given is None else given
    return [Vision(z, known if len(z) > 1 else 0) for z in latents]


@torch.no_grad()
def _look(codec: VisualTokenizer, items: Sequence[Item]) -> list[Segment]:
    frames = _stacked(items, "frames")
    cnn = codec.features(frames).numpy()
    return [Look(c, f) for c, f in zip(cnn, frames.numpy(), strict=True)]


@torch.no_grad()
def _audio(codec: AudioCodec, items: Sequence[Item], predicted: bool) -> list[Segment]:
    return [Audio(codes, predicted) for codes in codec.encode(_stacked(items, "wave")).numpy()]


def _stacked(items: Sequence[Item], name: str) -> torch.Tensor:
    values = [getattr(item, name) for item in items]
    if any(value is None for value in values):
        raise ValueError(f"an item of the task {items[0].task} needs {name}")
    return torch.from_numpy(np.stack(values))
