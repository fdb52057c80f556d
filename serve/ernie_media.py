"""Pictures and sounds of requests and answers: base64 to arrays, arrays to files that say what made them.

Notable choices
- What comes in is bounded from cheap to dear: characters of base64, bytes, the pixels or samples that a header announces; only
  then is anything decoded, by raysys.data.media, and brought to the form of the training data by its rules (cut to the canvas'
  proportions around the middle and resized; one channel, resampled, silence at the end).
- What goes out is marked as generated: PNG text chunks, WAV INFO chunks. A mark can be removed; it is there for the honest.
"""

from __future__ import annotations

import base64
import binascii
import io
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from raysys.data.datasets import DataError
from raysys.data.media import decode_picture, decode_sound
from raysys.data.multimodal import F32, Form
from raysys.systems.ernie.setting import FormSetting
from serve.refusal import Refused

T = TypeVar("T")
RATES = (4000, 8000, 11_025, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000)
"""Samples per second that are taken, besides the model's own: resampling between odd rates needs filters as long as the rate."""
BROKEN = (DataError, struct.error, zlib.error, IndexError, KeyError, EOFError, OverflowError, TypeError, MemoryError)
"""What parsers raise of files made to break them."""


class Bounds(NamedTuple):
    """What is taken of a file."""

    bytes: int
    pixels: int


def form_of(setting: FormSetting) -> Form:
    """The form of a run's data."""
    return Form(setting.frames, setting.channels, setting.height, setting.width, setting.rate, setting.samples)


def picture(encoded: str, name: str, form: Form, bounds: Bounds) -> F32:
    """(C, H, W) in [0, 1] of a PNG or JPEG in base64; Refused with 422 where it is none, 413 where it is too large."""
    data = _decoded(encoded, name, bounds.bytes)
    return _read(name, lambda: decode_picture(data, name, form, bounds.pixels))


def sound(encoded: str, name: str, form: Form, bounds: Bounds) -> F32:
    """(n,) in [-1, 1], the form's length, of a PCM WAV in base64; Refused as of `picture`."""
    data = _decoded(encoded, name, bounds.bytes)
    return _read(name, lambda: decode_sound(data, name, form, {*RATES, form.rate}))


def _decoded(encoded: str, name: str, most: int) -> bytes:
    if len(encoded) > (most + 2) // 3 * 4:
        raise Refused(413, f"{name}: got {len(encoded)} characters of base64; at most {most} bytes are allowed")
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refused(422, f"{name}: is not base64 ({error})") from error


def _read(name: str, read: Callable[[], T]) -> T:
    try:
        return read()
    except BROKEN as error:
        said = str(error).removeprefix("data: ").removeprefix(f"{name} ") or type(error).__name__
        raise Refused(422, f"{name}: {said}") from error


# ---------------------------------------------------------------- what goes out


def png(pixels: F32, mark: str) -> bytes:
    """A PNG of (C, H, W) in [0, 1], with its mark in the text chunks Software and Comment."""
    from PIL import Image, PngImagePlugin

    told = PngImagePlugin.PngInfo()
    told.add_text("Software", "raysys")
    told.add_text("Comment", mark)
    bytes_ = (np.clip(pixels, 0, 1) * 255).round().astype(np.uint8)
    image = Image.fromarray(bytes_[0] if len(bytes_) == 1 else np.ascontiguousarray(bytes_.transpose(1, 2, 0)))
    out = io.BytesIO()
    image.save(out, "PNG", pnginfo=told)
    return out.getvalue()


def text64(content: bytes) -> str:
    """Base64."""
    return base64.b64encode(content).decode()


def stack(pictures: Sequence[F32]) -> F32:
    """(T, C, H, W)."""
    return np.stack(pictures).astype(np.float32)
