"""Samples packed into rows: the tensors that the model reads, and what it is to predict.

Notable choices
- Rows hold whole documents, first-fit; attention does not cross them (`doc`). So a packed sample gives what it gives alone.
- The bits of all images of one length are planned in one call, with the flips of self-correction (Section 2.5).
- Numbers that products are made of lie in torch's own memory: numpy's is aligned by chance, and products of other alignment have
  other bits.
- Features of visual, look and audio tokens are kept flat, in the order of their places: nothing is stored for other tokens.

Shapes: R rows of T places, P = R T flat places; Nv visual, Nl look, Na audio tokens; d bits, Q levels, K scales.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from raysys.systems.ernie.stream import MODALITY, NONE, TASKS, Audio, Kind, Laid, Look, Vision, window


class Plan(Protocol):
    """What `MultiScaleBits.plan` returns."""

    @property
    def bits(self) -> list[Tensor]: ...  # K of (..., h_k, w_k, d)

    @property
    def inputs(self) -> list[Tensor]: ...  # K of (..., h, w, d): of scales 2 .. K, and the sum


Planner = Callable[[Tensor], Plan]
"""Latents (S, T, h, w, d) to bits and inputs."""


@dataclass(frozen=True)
class Seen:
    """Images or videos of one shape to be understood: cnn (S, T, hp, wp, C1), pixels (S, T, C, H, W), each read once and put
    wherever it is shown: token which (N,) of the S n goes to places (N,)."""

    cnn: Tensor
    pixels: Tensor
    places: Tensor
    which: Tensor


@dataclass(frozen=True)
class Batch:
    """Rows of tokens and their targets; places count flat over (R, T)."""

    kind: Tensor
    ids: Tensor
    doc: Tensor
    """Which document of its row a token belongs to; -1 where there is none."""
    group: Tensor
    position: Tensor
    task: Tensor
    """Index in TASKS; -1 where there is no token."""
    modality: Tensor
    next: Tensor
    """Text token predicted at a place, or NONE."""
    further: Tensor
    """Text token after that one where both are text, or NONE (multi-token prediction)."""
    visual: Tensor
    visual_at: Tensor
    scale: Tensor
    seen: tuple[Seen, ...]
    codes: Tensor
    audio_at: Tensor
    bit_at: Tensor
    bits: Tensor
    bit_scale: Tensor
    code_at: Tensor
    code: Tensor
    """Codes (Nc, Q) predicted at a place; level 0 may be the end, all others of its row then are NONE."""

    @property
    def rows(self) -> int:
        return len(self.kind)

    @property
    def valid(self) -> Tensor:
        """(R, T): where there is a token."""
        return self.doc >= 0

    def visible(self) -> Tensor:
        """(R, T, T): whether token i sees token j. Places without a token see each other, so that no softmax is empty."""
        same = self.doc[:, :, None] == self.doc[:, None, :]
        return same & (self.group[:, None, :] <= self.group[:, :, None])

    def to(self, device: str) -> Batch:
        if device == "cpu":
            return self
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        seen = tuple(Seen(*(t.to(device) for t in (s.cnn, s.pixels, s.places, s.which))) for s in self.seen)
        return replace(self, seen=seen, **moved)


def first_fit(lengths: Sequence[int], row: int) -> list[list[int]]:
    """Indices of samples for each row, in the order given.

    Raises:
        ValueError: a sample is longer than a row.
    """
    rows, room = list[list[int]](), list[int]()
    for i, length in enumerate(lengths):
        if length > row:
            raise ValueError(f"row: got a sample of {length} tokens for rows of {row}; expected longer rows")
        place = next((r for r, left in enumerate(room) if left >= length), None)
        if place is None:
            rows.append([i])
            room.append(row - length)
        else:
            rows[place].append(i)
            room[place] -= length
    return rows


def pack(
    laid: Sequence[Laid], row: int | None, planner: Planner, bits: int, levels: int, end: int, shared: bool = False
) -> Batch:
    """Batch of samples.

    Args:
        row: places of a row; None gives each sample a row of its own.
        planner: quantises latents, see `MultiScaleBits.plan`.
        bits: d. levels: Q. end: the code of level 0 that says that an audio has ended.
        shared: an image to be understood that several samples hold as the same object is read once.
    """
    rows = [[i] for i in range(len(laid))] if row is None else first_fit([len(one) for one in laid], row)
    width = max(sum(len(laid[i]) for i in members) for members in rows)
    shape = (len(rows), width)
    kind, ids, group, scale = (np.zeros(shape, np.int64) for _ in range(4))
    doc, task = np.full(shape, -1, np.int64), np.full(shape, -1, np.int64)
    following = np.full(shape, NONE, np.int64)
    position = np.zeros((*shape, 3), np.float32)
    start = np.zeros(len(laid), np.int64)
    for r, members in enumerate(rows):
        at = 0
        for number, i in enumerate(members):
            one, stop = laid[i], at + len(laid[i])
            start[i] = r * width + at
            kind[r, at:stop], ids[r, at:stop], group[r, at:stop] = one.kind, one.ids, one.group
            scale[r, at:stop], following[r, at:stop] = one.scale, one.next
            position[r, at:stop], doc[r, at:stop] = one.position, number
            task[r, at:stop] = TASKS.index(one.sample.task) if one.sample.task in TASKS else len(TASKS)
            at = stop
    modality = np.array([MODALITY[Kind(k)] for k in range(4)])[kind]
    further = np.full(shape, NONE, np.int64)
    both = (following[:, :-1] >= 0) & (following[:, 1:] >= 0) & (doc[:, :-1] == doc[:, 1:]) & (kind[:, 1:] == Kind.TEXT)
    further[:, :-1][both] = following[:, 1:][both]
    flat_kind = np.where(doc >= 0, kind, -1).reshape(-1)
    visual_at, audio_at = (np.flatnonzero(flat_kind == k) for k in (Kind.VISUAL, Kind.AUDIO))
    visual, bit_at, bit, bit_scale = _visual(laid, start, planner, visual_at, bits)
    codes, code_at, code = _audio(laid, start, audio_at, levels, end)
    t = torch.from_numpy
    return Batch(
        t(kind), t(ids), t(doc), t(group), t(position), t(task), t(modality), t(following), t(further),
        visual, t(visual_at), t(scale.reshape(-1)[visual_at]), _seen(laid, start, shared), codes, t(audio_at),
        bit_at, bit, bit_scale, code_at, code,
    )  # fmt: skip


def _visual(
    laid: Sequence[Laid], start: np.ndarray, planner: Planner, places: np.ndarray, d: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs (Nv, d) in the order of places; then of every bit target: place, bits, scale."""
    found: dict[tuple[int, ...], list[tuple[int, int, Vision]]] = {}
    for i, one in enumerate(laid):
        segments = [s for s in one.sample.segments if isinstance(s, Vision)]
        for n, vision in enumerate(segments):
            found.setdefault(vision.latents.shape, []).append((i, n, vision))
    inputs = torch.zeros(len(places), d)
    at, targets, scales = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, d, dtype=torch.bool)], list[int]()
    for shape, members in found.items():
        plan = planner(torch.from_numpy(np.stack([vision.latents for _, _, vision in members])).clone())
        frames = shape[0]
        tokens = torch.cat([x.flatten(2, 3) for x in plan.inputs], 2)  # (S, T, n, d): scales 2 .. K, then the sum
        wanted = torch.cat([b.flatten(2, 3) for b in plan.bits], 2)  # (S, T, m, d): scales 1 .. K
        which = [k for k, b in enumerate(plan.bits) for _ in range(b.shape[2] * b.shape[3])]
        for s, (i, n, vision) in enumerate(members):
            first = int(np.searchsorted(places, start[i] + laid[i].visual_start[n]))
            inputs[first : first + frames * tokens.shape[2]] = tokens[s].flatten(0, 1)
            at.append(torch.as_tensor(laid[i].bit_at[n], dtype=torch.int64) + int(start[i]))
            targets.append(wanted[s, vision.given :].flatten(0, 1))
            scales += which * (frames - vision.given)
    return inputs, torch.cat(at), torch.cat(targets), torch.tensor(scales, dtype=torch.int64)


def _audio(
    laid: Sequence[Laid], start: np.ndarray, places: np.ndarray, levels: int, end: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (Na, Q) in the order of places; then of every predicted frame: place and codes."""
    codes = np.zeros((len(places), levels), np.int64)
    at, targets = list[int](), [np.zeros((0, levels), np.int64)]
    for i, one in enumerate(laid):
        segments = [s for s in one.sample.segments if isinstance(s, Audio)]
        for first, audio in zip(one.audio_start, segments, strict=True):
            where = int(np.searchsorted(places, start[i] + first))
            codes[where : where + len(audio.codes)] = audio.codes
        for predicts, audio in zip(one.code_at, [s for s in segments if s.predicted], strict=True):
            at += [int(start[i]) + place for place in predicts]
            stop = np.full((1, levels), NONE)
            stop[0, 0] = end
            targets += [audio.codes, stop]
    return torch.from_numpy(codes), torch.tensor(at, dtype=torch.int64), torch.from_numpy(np.concatenate(targets))


def _seen(laid: Sequence[Laid], start: np.ndarray, shared: bool) -> tuple[Seen, ...]:
    found: dict[tuple[int, ...], dict[int, tuple[Look, list[int]]]] = {}
    for i, one in enumerate(laid):
        looks = [s for s in one.sample.segments if isinstance(s, Look)]
        for first, look in zip(one.look_start, looks, strict=True):
            of_shape = found.setdefault(look.cnn.shape, {})
            of_shape.setdefault(id(look) if shared else len(of_shape), (look, []))[1].append(int(start[i]) + first)
    made = []
    for shape, members in found.items():
        n = shape[0] // window(shape[0]) * (shape[1] // 2) * (shape[2] // 2)
        shown = [(number, first) for number, (_, firsts) in enumerate(members.values()) for first in firsts]
        places, which = (
            torch.cat([torch.arange(at, at + n) for at in ats])
            for ats in ([first for _, first in shown], [n * number for number, _ in shown])
        )
        cnn, pixels = (
            torch.from_numpy(np.stack([getattr(look, name) for look, _ in members.values()]))
            for name in ("cnn", "pixels")
        )
        made.append(Seen(cnn.float().clone(), pixels.float().clone(), places, which))
    return tuple(made)
