"""What ships with the dependencies, made into captioned images, videos and tones, and text.

Notable choices
- A digit (8 x 8, real handwriting) lies in one of four quadrants of the canvas, or moves in one of four directions over its
  frames, from a start and across a lane that are drawn.
- A tone is an exponential chirp: low (300 Hz) or high (900 Hz), up to 10 % off, rising or falling by an octave's half, or steady,
  with its phase and noise drawn anew.
- Images are the product of digits and quadrants in an order drawn from the seed: a first part of them is a fair sample.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from raysys.data.datasets import DataError
from raysys.data.multimodal import F32, Form, Item, Kind, Lazy
from raysys.runtime.seeds import Seeds, Stream

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PLACES = ("top left", "top right", "bottom left", "bottom right")
DIRECTIONS = ("left", "right", "up", "down")
REGISTERS = {"low": 300.0, "high": 900.0}
SHAPES = {"rising": 1.0, "steady": 0.0, "falling": -1.0}
SPREAD = 0.1
"""How far a tone's frequency may be off its register's, as a share of it."""
BEND = 0.5
"""Octaves that a tone rises or falls in each direction from its middle: an octave from end to end."""
NOISE = 0.02
SIDE = 8
"""Pixels of a digit."""
EVERY = 5
"""One digit of so many is held out: those with index % 5 == 0."""
SHARED = 8
"""Words in a row by which a held-out text counts as known from training."""
IMAGE, VIDEO, AUDIO, PHOTO = 0, 2, 4, 6
"""Rounds of the random streams; held-out items have the next one."""


def kinds(form: Form, seed: int) -> dict[str, Kind]:
    """All four kinds."""
    made = {"text": topics(form), "audio": tones(form, seed)}
    if form.height < 2 * SIDE or form.width < 2 * SIDE:
        raise DataError(
            f"data: got a canvas of {form.height} x {form.width}; embedded digits need {2 * SIDE} x {2 * SIDE}"
        )
    return made | {"image": images(form, seed), "video": videos(form, seed)}


@cache
def digits() -> tuple[F32, NDArray[np.int64]]:
    """scikit-learn's digits (1797, 8, 8) in [0, 1] with their labels."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return (bunch.images / 16.0).astype(np.float32), bunch.target.astype(np.int64)


def chosen(held_out: bool) -> NDArray[np.int64]:
    """Indices of digits of a split."""
    every = np.arange(len(digits()[1]))
    return every[(every % EVERY == 0) == held_out]


def images(form: Form, seed: int) -> Kind:
    """A digit in a quadrant: "a seven at the top left"."""

    def split(held_out: bool) -> Lazy:
        which, places = chosen(held_out), len(PLACES)
        order = Seeds(seed).rng(Stream.SHUFFLE, 0, IMAGE + held_out).permutation(len(which) * places)

        def make(i: int) -> Item:
            digit, place = int(which[order[i] // places]), int(order[i] % places)
            value = int(digits()[1][digit])
            canvas = np.zeros((1, form.channels, form.height, form.width), np.float32)
            top, left = (place // 2) * (form.height - SIDE), (place % 2) * (form.width - SIDE)
            canvas[:, :, top : top + SIDE, left : left + SIDE] = digits()[0][digit]
            facts = {"digit": str(value), "place": PLACES[place]}
            return Item("", f"a {NAMES[value]} at the {PLACES[place]}", canvas, facts=facts)

        return Lazy(len(order), make)

    return Kind(split(False), split(True), "scikit-learn digits (UCI, CC BY 4.0)")


def videos(form: Form, seed: int) -> Kind:
    """A digit that moves over the canvas: "a three moving right"."""

    def split(held_out: bool, count: int) -> Lazy:
        which = chosen(held_out)

        def make(i: int) -> Item:
            drawn = Seeds(seed).rng(Stream.BATCH, i, VIDEO + held_out)
            digit, way = int(which[drawn.integers(len(which))]), int(drawn.integers(len(DIRECTIONS)))
            value = int(digits()[1][digit])
            along, across = (form.width, form.height) if way < 2 else (form.height, form.width)
            step = (along - SIDE) // max(1, form.frames - 1)
            start = int(drawn.integers(along - SIDE - step * (form.frames - 1) + 1))
            lane = int(drawn.integers(across - SIDE + 1))
            at = start + step * np.arange(form.frames)
            at = along - SIDE - at if way in (0, 2) else at  # left and up run backwards
            clip = np.zeros((form.frames, form.channels, form.height, form.width), np.float32)
            for t, place in enumerate(at):
                top, left = (lane, place) if way < 2 else (place, lane)
                clip[t, :, top : top + SIDE, left : left + SIDE] = digits()[0][digit]
            facts = {"digit": str(value), "direction": DIRECTIONS[way]}
            return Item("", f"a {NAMES[value]} moving {DIRECTIONS[way]}", clip, facts=facts)

        return Lazy(count, make)

    return Kind(split(False, form.videos), split(True, form.held_out), "made from scikit-learn digits (UCI, CC BY 4.0)")


def tones(form: Form, seed: int) -> Kind:
    """A tone of a register and a shape: "a low rising tone"."""
    if form.rate < 4000:
        raise DataError(f"data: got {form.rate} samples per second; the embedded tones need 4000 or more")

    def split(held_out: bool, count: int) -> Lazy:
        def make(i: int) -> Item:
            drawn = Seeds(seed).rng(Stream.BATCH, i, AUDIO + held_out)
            register = tuple(REGISTERS)[int(drawn.integers(len(REGISTERS)))]
            shape = tuple(SHAPES)[int(drawn.integers(len(SHAPES)))]
            wave = tone(form, REGISTERS[register] * drawn.uniform(1 - SPREAD, 1 + SPREAD), SHAPES[shape], drawn)
            return Item("", f"a {register} {shape} tone", wave=wave, facts={"register": register, "shape": shape})

        return Lazy(count, make)

    return Kind(split(False, form.tones), split(True, form.held_out), "generated, no external sound")


def tone(form: Form, frequency: float, bend: float, drawn: np.random.Generator) -> F32:
    """A chirp (n,) whose frequency passes `frequency` in its middle and changes by `bend` octaves from end to end."""
    t = np.arange(form.samples) / form.rate
    span = form.samples / form.rate
    octaves = bend * BEND * (2 * t / span - 1)
    phase = 2 * np.pi * np.cumsum(frequency * 2.0**octaves) / form.rate + drawn.uniform(0, 2 * np.pi)
    edge = np.minimum(1.0, np.minimum(t, t[::-1]) / 0.01)  # ten milliseconds in and out, so that it does not click
    return (0.5 * edge * np.sin(phase) + NOISE * drawn.standard_normal(form.samples)).astype(np.float32)


def pieces(text: str, most: int) -> list[str]:
    """A text cut after line breaks or spaces into parts of at most `most` characters; together they are the text."""
    parts, at = [], 0
    while at < len(text):
        part = text[at : at + most]
        if at + most < len(text):
            cut = max(part.rfind("\n", most // 2), part.rfind(" ", most // 2)) + 1
            part = part[: cut or most]
        parts.append(part)
        at += len(part)
    return parts


def of_texts(train: list[str], test: list[str], licence: str, note: str = "") -> Kind:
    """Pieces of text as they are, in their order."""
    return Kind(
        Lazy(len(train), lambda i: Item("", train[i])), Lazy(len(test), lambda i: Item("", test[i])), licence, note
    )


def topics(form: Form) -> Kind:
    """Python's own documentation, by topic; another version of Python has slightly other words."""
    from pydoc_data.topics import topics as found

    train, test = list[str](), list[str]()
    for number, name in enumerate(sorted(found)):
        (test if number % 10 == 0 else train).append(found[name])
    kept, wanted = ([piece for text in texts for piece in pieces(text, form.piece)] for texts in (train, test))
    apart = unseen(wanted, train)
    note = f"{len(wanted) - len(apart)} of {len(wanted)} held-out pieces share {SHARED} words in a row with training; left out"
    return of_texts(kept, apart, "Python documentation (PSF licence)", note)


def unseen(texts: list[str], train: list[str], words: int = SHARED) -> list[str]:
    """Those of `texts` that share no so many words in a row with any of `train` (topics quote each other)."""

    def runs(text: str) -> set[tuple[str, ...]]:
        found = text.split()
        return {tuple(found[i : i + words]) for i in range(len(found) - words + 1)}

    known = set[tuple[str, ...]]().union(*map(runs, train))
    return [text for text in texts if known.isdisjoint(runs(text))]


def photos(form: Form, seed: int, count: int = 2048) -> Kind:
    """Crops of scikit-learn's two photos: of the left four fifths to train on, of the right fifth to test on."""
    from sklearn.datasets import load_sample_images

    named = {"china": "a piece of a temple", "flower": "a piece of a flower"}
    found = load_sample_images()
    whole = [(np.asarray(image) / 255.0).astype(np.float32).transpose(2, 0, 1) for image in found.images]
    if form.channels == 1:
        whole = [image.mean(0, keepdims=True) for image in whole]
    height, width = whole[0].shape[1:]
    border = width * 4 // 5
    if form.height > height or form.width > width - border:
        raise DataError(
            f"data: got a canvas of {form.height} x {form.width}; crops of the photos are up to {height} x {width - border}"
        )

    def split(held_out: bool, many: int) -> Lazy:
        low, high = (border, width) if held_out else (0, border)

        def make(i: int) -> Item:
            drawn = Seeds(seed).rng(Stream.BATCH, i, PHOTO + held_out)
            which = int(drawn.integers(len(whole)))
            top = int(drawn.integers(height - form.height + 1))
            left = int(drawn.integers(low, high - form.width + 1))
            crop = whole[which][None, :, top : top + form.height, left : left + form.width]
            name = tuple(named)[which]
            return Item("", named[name], np.ascontiguousarray(crop), facts={"photo": name})

        return Lazy(many, make)

    return Kind(split(False, count), split(True, form.held_out), "scikit-learn sample images (CC BY 2.0)")
