"""A run of the unified model with random weights, for the tests of serve."""

from __future__ import annotations

import base64
import io
import struct
from pathlib import Path

import numpy as np
import torch

from raysys.runtime.storage import Storage
from raysys.systems.ernie.artifact import Bundle, Tokenizers, save
from raysys.systems.ernie.model import UniModel
from raysys.systems.ernie.setting import FormSetting, ModelSetting
from raysys.systems.ernie.stream import TASKS
from raysys.systems.ernie.tokenizers.audio import AudioCodec, AudioSetting
from raysys.systems.ernie.tokenizers.text import TextTokenizer
from raysys.systems.ernie.tokenizers.visual import VisualSetting, VisualTokenizer

MODEL = ModelSetting(width=32, layers=12, heads=2, experts=8, active=4, expert_width=16, shared_width=16)
FORM = FormSetting(samples=512)
HOP = 32


def make_bundle(tasks: tuple[str, ...] = TASKS, seed: int = 3) -> Bundle:
    """Tokenizers and model as they start, but for a text head that hardly ever ends a text."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text = TextTokenizer.train(["a seven at the top left, and a low tone that rises"] * 3, 300)
        visual = VisualTokenizer(VisualSetting(bits=6, width=8), 1, FORM.height, FORM.width)
        visual.quantiser.observe(visual.raw(torch.rand(8, 1, 1, 16, 16)).detach())
        audio = AudioCodec(AudioSetting(hop=HOP, levels=3, codes=8, width=16, latent=8, bands=4))
        audio.quantiser.codebooks.normal_()
        tokenizers = Tokenizers(FORM, text, visual.eval(), audio.eval(), "made up", "none", tasks)
        model = UniModel(MODEL, tokenizers.sizes)
        for layer in model.layers:
            torch.nn.init.normal_(layer.moe.bias, std=0.1)
        model.text.weight.data *= 8.0
        model.text.weight.data[2] = 0.0  # the end has a logit of 0 among those of N(0, 4.6): one text in millions ends
    return Bundle.of(tokenizers, model.eval().requires_grad_(False))


def write_run(run: Path, tasks: tuple[str, ...] = TASKS, model: bool = True) -> Path:
    """The artifact of a bundle."""
    bundle = make_bundle(tasks)
    save(Storage(run), bundle if model else Tokenizers(*(getattr(bundle, n) for n in Tokenizers.__dataclass_fields__)))
    return run


def png64(width: int = 16, height: int = 16, seed: int = 0, mode: str = "L", kind: str = "PNG") -> str:
    """A picture of noise in base64."""
    from PIL import Image

    rng, out = np.random.default_rng(seed), io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).convert(mode).save(out, kind)
    return b64(out.getvalue())


def wav_bytes(
    samples: int = 512, rate: int = 4000, channels: int = 1, seed: int = 0, declared: int | None = None
) -> bytes:
    """A WAV file of noise; `declared` samples are announced."""
    rng = np.random.default_rng(seed)
    data = (rng.normal(size=samples * channels) * 3000).astype("<i2").tobytes()
    told = 2 * channels * (samples if declared is None else declared)
    form = struct.pack("<HHIIHH", 1, channels, rate, 2 * channels * rate, 2 * channels, 16)
    inside = b"WAVEfmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", told) + data
    return b"RIFF" + struct.pack("<I", len(inside)) + inside


def b64(content: bytes) -> str:
    return base64.b64encode(content).decode()
