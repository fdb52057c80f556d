"""Pictures, sounds and texts from files that nobody vouches for, brought to one form; and sounds to files.

Notable choices
- Sizes are bounded before anything is decoded: bytes of the file, pixels or samples that its header announces.
- PNG and JPEG are the only picture formats that are ever decoded (Pillow knows dozens, each with its own parser), and PCM WAV,
  read by the standard library, the only sound format.
"""

from __future__ import annotations

import io
import struct
import warnings
import wave
from collections.abc import Collection
from fractions import Fraction
from pathlib import Path

import numpy as np

from raysys.data.datasets import DataError
from raysys.data.multimodal import F32, Form

PICTURES = (".png", ".jpg", ".jpeg")
MOST_BYTES = 64 << 20
"""Largest file that is read."""
MOST_PIXELS = 4096 * 4096
MOST_SECONDS = 60
LOUD = 0.5
"""What the loudest sample of a sound is brought to: recordings differ in level, and a codec would spend its codes on that."""
SILENT = 1e-3
"""Sounds whose loudest sample is below this are left as they are."""


def read_bytes(file: Path) -> bytes:
    """A file of at most MOST_BYTES."""
    size = file.stat().st_size
    if size > MOST_BYTES:
        raise DataError(f"data: {file} has {size} bytes; expected at most {MOST_BYTES}")
    return file.read_bytes()


def read_text(file: Path) -> str:
    """A UTF-8 file, of at most MOST_BYTES."""
    try:
        return read_bytes(file).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"data: {file} is not UTF-8 text ({error.reason} at byte {error.start})") from error


def picture_size(file: Path) -> tuple[int, int]:
    """(height, width) from the header of a PNG or JPEG file, whose pixels are not decoded."""
    return _picture(read_bytes(file), file, None)[0]


def read_picture(file: Path, form: Form) -> F32:
    """A picture (C, H, W) in [0, 1], cut to the canvas' proportions around its middle and resized."""
    return _picture(read_bytes(file), file, form)[1]


def decode_picture(data: bytes, name: str, form: Form, most: int = MOST_PIXELS) -> F32:
    """`read_picture` of a file's content, called `name` in sentences, of at most `most` pixels."""
    return _picture(data, name, form, most)[1]


def _picture(data: bytes, file: Path | str, form: Form | None, most: int = MOST_PIXELS) -> tuple[tuple[int, int], F32]:
    from PIL import Image, UnidentifiedImageError

    raw = io.BytesIO(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(raw, formats=("PNG", "JPEG")) as image:
                width, height = image.size
                if width * height > most or min(width, height) < 1 or getattr(image, "n_frames", 1) > 1:
                    raise DataError(
                        f"data: {file} has {width} x {height} pixels; expected one picture of at most {most}"
                    )
                if form is None:
                    return (height, width), np.zeros(0, np.float32)
                grey = form.channels == 1
                scale = min(width / form.width, height / form.height)
                w, h = scale * form.width, scale * form.height
                box = ((width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2)
                if image.mode.startswith(("I", "F")):
                    raise DataError(f"data: {file} has more than 8 bits per pixel and channel; expected 8")
                if "A" in image.getbands() or "transparency" in image.info:  # what cannot be seen is black
                    seen = image.convert("RGBA")
                    opaque = Image.alpha_composite(Image.new("RGBA", seen.size, (0, 0, 0, 255)), seen)
                else:
                    opaque = image.convert("RGB") if image.mode == "P" else image.copy()
                whole = opaque.convert("L" if grey else "RGB")
                small = whole.resize((form.width, form.height), Image.Resampling.BOX if scale > 1 else None, box=box)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"data: {file} is not a whole PNG or JPEG picture ({str(error).splitlines()[0]})") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"data: {file} announces more pixels than {most}, and is not decoded") from error
    pixels = (np.asarray(small, np.float32) / np.float32(255)).reshape(form.height, form.width, form.channels)
    return (height, width), np.ascontiguousarray(pixels.transpose(2, 0, 1))


def sound_size(file: Path) -> tuple[int, int]:
    """(samples per second, samples of a channel) of a WAV file."""
    rate, found = _sound(read_bytes(file), file)
    return rate, len(found)


def read_sound(file: Path, form: Form) -> F32:
    """A wave (n,) in [-1, 1] at the form's rate and length."""
    rate, found = _sound(read_bytes(file), file)
    return _formed(rate, found, form)


def decode_sound(data: bytes, name: str, form: Form, rates: Collection[int]) -> F32:
    """`read_sound` of a file's content, called `name` in sentences; it has one of these rates, and is no longer than the form."""
    rate, found = _sound(data, name, rates)
    if len(found) * form.rate > form.samples * rate:
        raise DataError(f"data: {name} lasts {len(found) / rate:g} s; expected at most {form.samples / form.rate:g}")
    return _formed(rate, found, form)


def _formed(rate: int, found: F32, form: Form) -> F32:
    from scipy.signal import resample_poly

    ratio = Fraction(form.rate, rate)
    if ratio != 1:
        found = resample_poly(found, ratio.numerator, ratio.denominator)
    out = np.zeros(form.samples, np.float32)
    out[: len(found)] = found[: form.samples]
    peak = float(np.abs(out).max())
    return out * np.float32(LOUD / peak) if peak > SILENT else out


def _sound(data: bytes, file: Path | str, rates: Collection[int] | None = None) -> tuple[int, F32]:
    try:
        with wave.open(io.BytesIO(data), "rb") as sound:
            channels, depth, rate, count, *_ = sound.getparams()
            if rates is not None and rate not in rates:
                raise DataError(
                    f"data: {file} has {rate} samples per second; expected {', '.join(map(str, sorted(rates)))}"
                )
            if not 1000 <= rate <= 192_000 or not 1 <= channels <= 8 or not 1 <= count <= rate * MOST_SECONDS:
                raise DataError(
                    f"data: {file} announces {channels} channels and {count} samples at {rate} Hz; expected 1 to 8 channels,"
                    f" 1000 to 192000 Hz and up to {MOST_SECONDS} seconds"
                )
            if depth not in (1, 2, 3, 4):
                raise DataError(f"data: {file} has samples of {depth} bytes; expected 1 to 4")
            raw = sound.readframes(count)
    except (wave.Error, EOFError, OverflowError, RuntimeError) as error:  # the last for chunks longer than the file
        raise DataError(f"data: {file} is not a whole PCM WAV file ({error or 'it ends early'})") from error
    if len(raw) != count * channels * depth:
        raise DataError(f"data: {file} announces {count * channels * depth} bytes of sound but holds {len(raw)}")
    if depth == 1:
        found: F32 = np.frombuffer(raw, np.uint8).astype(np.float32) / np.float32(128) - np.float32(1)
    elif depth == 3:
        wide = np.zeros((count * channels, 4), np.uint8)
        wide[:, 1:] = np.frombuffer(raw, np.uint8).reshape(-1, 3)
        found = wide.view("<i4")[:, 0].astype(np.float32) / np.float32(2**31)
    else:
        found = np.frombuffer(raw, f"<i{depth}").astype(np.float32) / np.float32(2.0 ** (8 * depth - 1))
    return rate, found.reshape(count, channels).mean(1)


def pcm(wave: F32) -> bytes:
    """16-bit little-endian samples of a wave (n,) in [-1, 1]."""
    return (np.clip(wave, -1, 1) * 32767).round().astype("<i2").tobytes()


def wav(samples: bytes, rate: int, mark: str) -> bytes:
    """A WAV file of one channel of 16-bit samples, with its mark in the INFO chunks ISFT and ICMT."""
    info = b"INFO" + _chunk(b"ISFT", b"raysys\0") + _chunk(b"ICMT", mark.encode() + b"\0")
    form = struct.pack("<HHIIHH", 1, 1, rate, 2 * rate, 2, 16)
    inside = b"WAVE" + _chunk(b"fmt ", form) + _chunk(b"LIST", info) + _chunk(b"data", samples)
    return b"RIFF" + struct.pack("<I", len(inside)) + inside


def _chunk(name: bytes, content: bytes) -> bytes:
    return name + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)
