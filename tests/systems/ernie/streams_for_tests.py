"""A small model with random weights, and random samples of every task."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from raysys.systems.ernie.batch import Batch, pack
from raysys.systems.ernie.model import UniModel
from raysys.systems.ernie.setting import ModelSetting, Sizes
from raysys.systems.ernie.stream import Audio, Look, Sample, Text, Vision, lay
from raysys.systems.ernie.tokenizers.bits import MultiScaleBits

SCALES = ((1, 1), (2, 2), (4, 4))
SIZES = Sizes(vocabulary=40, bits=6, scales=SCALES, codes=8, levels=3, cnn=5, channels=1)
SMALL = ModelSetting(width=32, layers=5, heads=2, experts=8, active=3, expert_width=8, shared_width=16)


def quantiser() -> MultiScaleBits:
    """Each amplitude is larger than all finer ones together: an accumulated code, quantised again, has the bits it is made of."""
    bits = MultiScaleBits(SCALES, SIZES.bits)
    bits.amplitude.copy_(torch.tensor([4.0, 2.0, 1.0]) / 4)
    return bits


def small_model(setting: ModelSetting = SMALL, seed: int = 0) -> UniModel:
    torch.manual_seed(seed)
    model = UniModel(setting, SIZES).eval()
    for layer in model.layers:
        torch.nn.init.normal_(layer.moe.bias, std=0.1)
    return model


def text(rng: np.random.Generator, n: int, predicted: bool, closed: bool = True) -> Text:
    return Text(rng.integers(10, SIZES.vocabulary, n), predicted, closed)


def vision(rng: np.random.Generator, frames: int, given: int = 0) -> Vision:
    return Vision(rng.normal(size=(frames, 4, 4, SIZES.bits)).astype(np.float32), given)


def look(rng: np.random.Generator, frames: int) -> Look:
    cnn = rng.normal(size=(frames, 8, 8, SIZES.cnn)).astype(np.float32)
    return Look(cnn, rng.random((frames, 1, 16, 16)).astype(np.float32))


def audio(rng: np.random.Generator, n: int, predicted: bool) -> Audio:
    return Audio(rng.integers(0, SIZES.codes, (n, SIZES.levels)), predicted)


def samples(seed: int = 0) -> list[Sample]:
    """One of each task."""
    rng = np.random.default_rng(seed)
    return [
        Sample("lm", (text(rng, 9, True, closed=False),)),
        Sample("t2i", (text(rng, 4, False), vision(rng, 1))),
        Sample("i2t", (look(rng, 1), text(rng, 5, True))),
        Sample("t2v", (text(rng, 3, False), vision(rng, 3, given=1))),
        Sample("v2t", (look(rng, 4), text(rng, 4, True))),
        Sample("t2a", (text(rng, 4, False), audio(rng, 6, True))),
        Sample("a2t", (audio(rng, 5, False), text(rng, 4, True))),
    ]


def packed(given: Sequence[Sample], row: int | None = None) -> Batch:
    laid = [lay(one, SCALES) for one in given]
    return pack(laid, row, quantiser().plan, SIZES.bits, SIZES.levels, SIZES.codes)
