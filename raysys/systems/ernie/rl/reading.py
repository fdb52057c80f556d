"""Observations as prompts: raw text, pixels and waves through the tokenizers to what the model reads.

Notable choices
- A clip with each candidate appended is shown as a video of its own: motion is what the video path merges over time, and the
  candidates' order is that of the answers.
- `Audio` and `Look` prompts are the same that captions are trained on, so the model has seen their like in pre-training.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from raysys.systems.ernie.stream import F32, I64, Audio, Look, Sample, Segment, Text


class TextCodec(Protocol):
    def encode(self, text: str) -> I64: ...


class Features(Protocol):
    def features(self, frames: Tensor) -> Tensor: ...


class Codes(Protocol):
    def encode(self, wave: Tensor) -> Tensor: ...


class Reader:
    """Observations of the environments to samples without an answer.

    Args:
        text, visual, audio: trained tokenizers.
        channels: of the images that `visual` was trained on; grey observations are repeated for colour.
    """

    def __init__(self, text: TextCodec, visual: Features, audio: Codes, channels: int = 1) -> None:
        self.text, self.visual, self.audio, self.channels = text, visual, audio, channels

    def prompt(self, name: str, observation: Any) -> Sample:
        """A prompt for what an environment shows: a text, a wave, or a dictionary of texts and pictures."""
        if isinstance(observation, str):
            return Sample(name, (self._words(observation),))
        if isinstance(observation, np.ndarray):
            return Sample(name, (self._sound(observation),))
        segments: list[Segment] = []
        if "candidates" in observation:
            frames = observation["frames"]
            segments += [self._look(np.concatenate([frames, last[None]])) for last in observation["candidates"]]
        if "image" in observation:
            segments.append(self._look(observation["image"][None]))
        if "question" in observation:
            segments.append(self._words(observation["question"]))
        return Sample(name, tuple(segments))

    def _words(self, text: str) -> Text:
        return Text(self.text.encode(text), False)

    @torch.no_grad()
    def _sound(self, wave: F32) -> Audio:
        return Audio(self.audio.encode(torch.from_numpy(wave)[None])[0].numpy().astype(np.int64), False)

    @torch.no_grad()
    def _look(self, frames: F32) -> Look:
        """frames (T, 1, H, W)."""
        frames = np.repeat(frames, self.channels, 1)
        cnn = self.visual.features(torch.from_numpy(frames)[None])[0].numpy()
        return Look(cnn.astype(np.float32), frames)
