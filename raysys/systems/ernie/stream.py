"""Samples as one token stream: what every token is, where it is, what it may see and what it predicts.

    caption -> image     <bos> a seven ... <boi> [scale 2] [scale 3] [sum] <eoi>
    image -> caption     <bos> <boi> [look] <eoi> <sep> a seven ... (<eos>)
    tone -> caption      <bos> <boa> [frame] [frame] ... <eoa> <sep> a low ... (<eos>)

Notable choices
- A *group* is predicted at once from all earlier groups (Section 2 of the paper): a text token, the tokens of one scale of one
  frame, the codes of one audio frame. `group` numbers them; a token sees its document's groups up to its own.
- Text and audio targets are shifted, vision's are in place: the input at the places of scale k is what the coarser scales amount
  to, and predicts scale k. The first scale has one token; <boi> predicts it, or the last token of the frame before.
- The sum of a finished frame is a group at full resolution, not the single token of Figure 2: with three scales a pooled token
  would lose the finest one (ours; Section 2.5 of our specification).
- Positions are triples (time, height, width) after Uni-RoPE. In text and audio all three are the running index. A scale's tokens
  are centred on the finest grid: token i of n lies at (i + 1/2) N / n - 1/2. After a visual block the index goes on from the
  largest coordinate, plus one (INFERRED).

Shapes: n tokens of a sample, T frames, (h, w) latent grid, d bits of a token, Q code levels, K scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
NONE = -100
"""A target that is not there."""
TASKS = ("lm", "t2i", "i2t", "t2v", "v2t", "t2a", "a2t")
"""Language modelling; image from caption and back; frames from caption and first frames, and back; tone from caption and back."""


class Special(IntEnum):
    """Ids of the special tokens, the first of the vocabulary."""

    PAD = 0
    BOS = 1
    EOS = 2
    BOI = 3
    EOI = 4
    BOV = 5
    EOV = 6
    BOA = 7
    EOA = 8
    SEP = 9


class Kind(IntEnum):
    """What a token's input is."""

    TEXT = 0
    VISUAL = 1
    """What earlier scales amount to, at the resolution of the next (or, of a finished frame, at full resolution)."""
    LOOK = 2
    """Features of an image or video to be understood."""
    AUDIO = 3


MODALITY = {Kind.TEXT: 0, Kind.VISUAL: 1, Kind.LOOK: 1, Kind.AUDIO: 2}
MODALITIES = ("text", "vision", "audio")


@dataclass(frozen=True)
class Text:
    """Token ids (n,). Predicted text has a loss; if it is also `closed`, <eos> is predicted after it."""

    ids: I64
    predicted: bool
    closed: bool = True


@dataclass(frozen=True)
class Vision:
    """Latents (T, h, w, d) of an image (T = 1) or a video before quantisation; the first `given` frames have no loss."""

    latents: F32
    given: int = 0


@dataclass(frozen=True)
class Look:
    """An image or video to be understood: CNN features (T, H/2, W/2, C1) and pixels (T, C, H, W)."""

    cnn: F32
    pixels: F32


@dataclass(frozen=True)
class Audio:
    """Codes (n, Q)."""

    codes: I64
    predicted: bool


Segment = Text | Vision | Look | Audio


@dataclass(frozen=True)
class Sample:
    """What a model reads and predicts in one document."""

    task: str
    segments: tuple[Segment, ...]


@dataclass
class Laid:
    """A sample's tokens; arrays (n, ...). Features of visual and look tokens are filled in when a batch is made."""

    sample: Sample
    kind: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    group: list[int] = field(default_factory=list)
    position: list[tuple[float, float, float]] = field(default_factory=list)
    next: list[int] = field(default_factory=list)
    """Text token that is predicted, or NONE."""
    scale: list[int] = field(default_factory=list)
    """Scale that a visual token predicts; K for the sum of a frame; 0 elsewhere."""
    visual_start: list[int] = field(default_factory=list)
    """First visual token of each Vision segment."""
    look_start: list[int] = field(default_factory=list)
    audio_start: list[int] = field(default_factory=list)
    bit_at: list[list[int]] = field(default_factory=list)
    """For each Vision segment, the places that predict bits: frame by frame, scale by scale, of frames with a loss."""
    code_at: list[list[int]] = field(default_factory=list)
    """For each predicted Audio segment, the places that predict a frame's codes, then the place that predicts the end."""
    at: float = 0.0
    """The running index of the next token."""

    def __len__(self) -> int:
        return len(self.kind)

    def put(self, kind: Kind, id: int, position: tuple[float, float, float], new_group: bool, scale: int = 0) -> int:
        """Append a token and return its place."""
        last = self.group[-1] if self.group else -1
        self.kind.append(int(kind))
        self.ids.append(id)
        self.group.append(last + 1 if new_group else last)
        self.position.append(position)
        self.next.append(NONE)
        self.scale.append(scale)
        return len(self.kind) - 1

    def word(self, id: int) -> int:
        """Append a text token at the running index."""
        place = self.put(Kind.TEXT, id, (self.at, self.at, self.at), True)
        self.at += 1
        return place


def lay(sample: Sample, scales: Sequence[tuple[int, int]], opened: Special | None = None) -> Laid:
    """Lay a sample out as tokens.

    Args:
        scales: (h_k, w_k) of the visual scales, coarse to fine; the first is (1, 1).
        opened: a special token to append after the sample, which is then a prompt: SEP for text, BOI, BOV or BOA.
    """
    laid = Laid(sample)
    laid.word(Special.BOS)
    for i, segment in enumerate(sample.segments):
        last = i + 1 == len(sample.segments) and opened is None
        if isinstance(segment, Text):
            _text(laid, segment, last)
        elif isinstance(segment, Vision):
            laid.bit_at.append(_vision(laid, segment, scales, last))
        elif isinstance(segment, Look):
            _look(laid, segment)
        else:
            _audio(laid, segment)
    if opened is not None:
        laid.word(opened)
    return laid


def _text(laid: Laid, text: Text, last: bool) -> None:
    if not text.predicted:
        for id in text.ids:
            laid.word(int(id))
        return
    if len(laid) > 1:
        laid.word(Special.SEP)
    place = len(laid) - 1
    for id in text.ids:
        laid.next[place] = int(id)
        place = laid.word(int(id))
    if text.closed:
        laid.next[place] = int(Special.EOS)
        if not last:
            laid.word(Special.EOS)
    elif last and len(text.ids):  # the last token of a text that goes on elsewhere predicts nothing
        for row in (laid.kind, laid.ids, laid.group, laid.position, laid.next, laid.scale):
            row.pop()


def grid(h: int, w: int, full: tuple[int, int], at: float, frame: int) -> list[tuple[float, float, float]]:
    """Positions of the h x w tokens of a scale, centred on the `full` grid, of a frame in a block that starts at `at`."""
    H, W = full
    return [
        (at + frame, at + (i + 0.5) * H / h - 0.5, at + (j + 0.5) * W / w - 0.5) for i in range(h) for j in range(w)
    ]


def _vision(laid: Laid, vision: Vision, scales: Sequence[tuple[int, int]], last: bool) -> list[int]:
    frames, video = len(vision.latents), len(vision.latents) > 1
    before = laid.word(Special.BOV if video else Special.BOI)
    full, at, predicts = scales[-1], laid.at, list[int]()
    laid.visual_start.append(len(laid))
    for frame in range(frames):
        loss = frame >= vision.given
        if loss:
            predicts.append(before)
        for k in range(1, len(scales) + 1):
            h, w = scales[min(k, len(scales) - 1)]
            for i, position in enumerate(grid(h, w, full, at, frame)):
                before = laid.put(Kind.VISUAL, 0, position, i == 0, k)
                if loss and k < len(scales):
                    predicts.append(before)
    laid.at = at + max(frames - 1, full[0] - 1, full[1] - 1) + 1
    end = Special.EOV if video else Special.EOI
    if frames > vision.given:
        laid.next[before] = int(end)
    if not last:
        laid.word(end)
    return predicts


def window(frames: int) -> int:
    """Frames that are merged into one when a video is understood: 4, or all of a shorter one (Section 2.6: K = 4 or 16 patches).

    Raises:
        ValueError: a longer video is not a multiple of 4 frames.
    """
    if frames > 4 and frames % 4:
        raise ValueError(f"frames: got {frames} to be understood; expected at most 4, or a multiple of 4")
    return min(frames, 4)


def _look(laid: Laid, look: Look) -> None:
    frames, hp, wp = look.cnn.shape[:3]
    laid.word(Special.BOV if frames > 1 else Special.BOI)
    laid.look_start.append(len(laid))
    full, at = (hp // 2, wp // 2), laid.at
    moments = frames // window(frames)
    for moment in range(moments):
        for i, position in enumerate(grid(*full, full, at, moment)):
            laid.put(Kind.LOOK, 0, position, i == 0)
    laid.at = at + max(moments - 1, full[0] - 1, full[1] - 1) + 1
    laid.word(Special.EOV if frames > 1 else Special.EOI)


def _audio(laid: Laid, audio: Audio) -> None:
    places = [laid.word(Special.BOA)]
    laid.audio_start.append(len(laid))
    for _ in audio.codes:
        places.append(laid.put(Kind.AUDIO, 0, (laid.at, laid.at, laid.at), True))
        laid.at += 1
    if audio.predicted:
        laid.code_at.append(places)
    else:
        laid.word(Special.EOA)
