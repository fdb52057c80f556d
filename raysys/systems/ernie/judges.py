"""Who says whether a generated image, video, sound or caption shows what was asked for: judges that never saw the model.

Notable choices
- Digits are judged by a support vector machine trained on real training digits, cut out around the centre of their mass, so it
  reads them anywhere on a canvas. Place and direction are where that centre is and how it moves.
- Tones are judged by the track of the strongest frequency. Nothing of it is learned.
- Every judge errs: its agreement with the truth on what a tokenizer makes of originals (`tasks.ceilings`) is the most that a
  generated one can be expected to reach.

Facts are named strings, as items of `raysys.data.multimodal` have them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache

import numpy as np
from numpy.typing import NDArray

from raysys.data.multimodal_embedded import DIRECTIONS, NAMES, PLACES, REGISTERS, SHAPES, SIDE, chosen, digits

F32 = NDArray[np.float32]
Facts = dict[str, str]
Judge = Callable[[F32], list[Facts]]
"""Frames (N, T, C, H, W) or waves (N, n) -> the facts of each."""
FAINT = 0.15
"""Pixels below this share of full brightness do not count as ink."""
MIDDLE = float(np.sqrt(np.prod(list(REGISTERS.values()))))
"""Between low and high, in Hz."""
STEADY = 0.35
"""Octaves from end to end below which a tone is steady; the embedded ones have 0 or 1."""


class DigitJudge:
    """Which digit, in which quadrant, moving which way. Frames are in [0, 1]."""

    def __init__(self) -> None:
        from sklearn.svm import SVC

        which = chosen(held_out=False)
        canvas = np.zeros((len(which), 1, 1, 2 * SIDE, 2 * SIDE), np.float32)
        canvas[:, 0, 0, SIDE // 2 : -SIDE // 2, SIDE // 2 : -SIDE // 2] = digits()[0][which]
        self._model = SVC(C=10.0, gamma=0.02).fit(_cut(canvas[:, 0], _centre(canvas)[:, 0]), digits()[1][which])

    def __call__(self, frames: F32) -> list[Facts]:
        """Facts digit, place (of the first frame) and, of more than one frame, direction."""
        if frames.ndim != 5:
            raise ValueError(f"frames: got {frames.shape}; expected (N, T, C, H, W)")
        if not len(frames):
            return []
        n, t, _, height, width = frames.shape
        centre = _centre(frames)  # (N, T, 2)
        cut = _cut(frames.reshape(n * t, *frames.shape[2:]), centre.reshape(n * t, 2))
        votes = self._model.decision_function(cut).reshape(n, t, 10).sum(1)  # one digit for all frames
        below = (centre[:, 0, 0] >= (height - 1) / 2).astype(int)
        right = (centre[:, 0, 1] >= (width - 1) / 2).astype(int)
        told = [{"digit": str(v), "place": PLACES[p]} for v, p in zip(votes.argmax(1), 2 * below + right, strict=True)]
        if t > 1:
            y, x = (centre[:, -1] - centre[:, 0]).T
            ways = np.where(np.abs(x) >= np.abs(y), (x > 0).astype(int), 2 + (y > 0).astype(int))
            told = [facts | {"direction": DIRECTIONS[way]} for facts, way in zip(told, ways, strict=True)]
        return told


class ToneJudge:
    """Low or high; rising, steady or falling."""

    def __init__(self, rate: int = 4000, window: int = 256) -> None:
        self.rate, self.window = rate, window * rate // 4000

    def track(self, waves: F32) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The strongest frequency in Hz and its power (N, frames), by parabolic interpolation of the log-spectrum."""
        if waves.ndim != 2 or waves.shape[1] < 2 * self.window:
            raise ValueError(f"waves: got {waves.shape}; expected (N, n) with n at least {2 * self.window}")
        frames = np.lib.stride_tricks.sliding_window_view(waves, self.window, 1)[:, :: self.window // 2]
        power = np.abs(np.fft.rfft(frames * np.hanning(self.window), 4 * self.window)) ** 2 + 1e-12
        peak = power[..., 1:-1].argmax(-1) + 1
        a, b, c = (np.log(np.take_along_axis(power, peak[..., None] + d, -1)[..., 0]) for d in (-1, 0, 1))
        bend = a - 2 * b + c
        off = np.where(np.abs(bend) > 1e-9, 0.5 * (a - c) / np.where(np.abs(bend) > 1e-9, bend, 1), 0)
        return (peak + np.clip(off, -0.5, 0.5)) * self.rate / (4 * self.window), np.exp(b)

    def __call__(self, waves: F32) -> list[Facts]:
        """Facts register and shape."""
        if not len(waves):
            return []
        hertz, power = self.track(waves)
        octave, weight = np.log2(hertz), power / power.sum(1, keepdims=True)
        t = np.arange(octave.shape[1]) / max(1, octave.shape[1] - 1)
        mean_t, mean = (weight * t).sum(1, keepdims=True), (weight * octave).sum(1, keepdims=True)
        slope = (weight * (t - mean_t) * (octave - mean)).sum(1) / (weight * (t - mean_t) ** 2).sum(1)
        low = mean[:, 0] < np.log2(MIDDLE)
        return [
            {
                "register": "low" if is_low else "high",
                "shape": "rising" if s > STEADY else "falling" if s < -STEADY else "steady",
            }
            for is_low, s in zip(low, slope, strict=True)
        ]


@cache
def digit_judge() -> DigitJudge:
    """The judge of digits, trained once in a process (a tenth of a second)."""
    return DigitJudge()


def facts_of(caption: str) -> Facts:
    """What a caption of the embedded data claims; other words claim nothing, two answers to one question are `several`."""
    words = re.findall(r"[a-z]+", caption.lower())
    plain, told = " ".join(words), Facts()
    after = words[words.index("moving") :] if "moving" in words else []
    for name, found in (
        ("digit", [str(NAMES.index(word)) for word in words if word in NAMES]),
        ("place", [place for place in PLACES if place in plain]),
        ("direction", [word for word in after if word in DIRECTIONS]),
        ("register", [word for word in words if word in REGISTERS]),
        ("shape", [word for word in words if word in SHAPES]),
    ):
        if found:
            told[name] = found[-1] if len(set(found)) == 1 else "several"
    return told


def _ink(frames: F32) -> F32:
    """Brightness (..., H, W) of frames (..., C, H, W) where it counts."""
    grey = frames.mean(-3)
    return np.where(grey > FAINT, grey, 0).astype(np.float32)


def _centre(frames: F32) -> NDArray[np.float64]:
    """Row and column (..., 2) of the centre of the ink; the canvas' middle if there is none."""
    ink = _ink(frames).astype(np.float64)
    mass = ink.sum((-2, -1))
    height, width = ink.shape[-2:]
    y, x = (ink.sum(-1) * np.arange(height)).sum(-1), (ink.sum(-2) * np.arange(width)).sum(-1)
    empty = mass < 1e-6
    safe = np.where(empty, 1, mass)
    return np.stack([np.where(empty, (height - 1) / 2, y / safe), np.where(empty, (width - 1) / 2, x / safe)], -1)


def _cut(frames: F32, centre: NDArray[np.float64]) -> F32:
    """Pixels (N, 100) in [0, 4] of 10 x 10 around the centres (N, 2) of frames (N, C, H, W)."""
    side, grey = SIDE + 2, frames.mean(1)
    padded = np.pad(grey, ((0, 0), (side, side), (side, side)))
    at = np.round(centre - (side - 1) / 2).astype(int) + side
    rows, columns = at[:, 0, None] + np.arange(side), at[:, 1, None] + np.arange(side)
    return 4 * padded[np.arange(len(grey))[:, None, None], rows[:, :, None], columns[:, None]].reshape(len(grey), -1)
