"""Text, images, video and audio with captions: an embedded set of all four, and folders of one's own.

Shapes: T frames, C channels, H x W pixels; a wave has n samples.

Notable choices
- The name says where the data comes from: `embedded`, `photos`, a folder, or `embedded+FOLDER`, where what the folder has takes
  the place of the embedded set's.
- Items are lazy: an item is a function of (seed, kind, split, index) and nothing is held in memory but what the files weigh.
  Tones and videos are drawn, so a run may ask for as many as it wants; real digits are what they are.
- Both directions of a pair (image from caption, caption from image) are tasks over the same items.

| kind | training | held out |
|---|---|---|
| text | 9 topics of 10 of Python's documentation | topics 0, 10, 20, ... by name, without what training quotes |
| image | scikit-learn digits with index % 5 != 0, in each quadrant | index % 5 == 0, in each quadrant |
| video | the same training digits, moving | the same held-out digits, moving |
| audio | tones drawn for training | tones drawn for testing, from other random numbers |
| photos | crops of the left four fifths of two photos | crops of the right fifth |
| a folder | see `raysys.data.multimodal_files` | |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray

from raysys.data.datasets import DataError

F32 = NDArray[np.float32]
KIND = {"lm": "text", "t2i": "image", "i2t": "image", "t2v": "video", "v2t": "video", "t2a": "audio", "a2t": "audio"}
"""Task -> the kind of data it is made from."""


@dataclass(frozen=True)
class Item:
    """One example of a task: text (or caption), frames (T, C, H, W) in [0, 1], wave (n,) in [-1, 1], and facts for judges."""

    task: str
    text: str
    frames: F32 | None = None
    wave: F32 | None = None
    facts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Form:
    """What everything is brought to: frames of videos, channels, height, width, samples per second, samples of a wave.

    `tones` and `videos` are how many of these the embedded set draws for training; `piece` the most characters of a text.
    """

    frames: int = 4
    channels: int = 1
    height: int = 16
    width: int = 16
    rate: int = 4000
    samples: int = 2048
    tones: int = 4096
    videos: int = 8192
    held_out: int = 512
    piece: int = 400

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise DataError(f"data: got {self.channels} channels; expected 1 (grey) or 3 (colour)")
        for name, low, high in LIMITS:
            value = getattr(self, name)
            if not low <= value <= high:
                raise DataError(f"data: got {name} {value}; expected {low} to {high}")


LIMITS = (
    ("frames", 1, 64), ("height", 8, 512), ("width", 8, 512), ("rate", 1000, 48_000), ("samples", 64, 1 << 21),
    ("tones", 1, 1 << 24), ("videos", 1, 1 << 24), ("held_out", 1, 1 << 20), ("piece", 16, 1 << 16),
)  # fmt: skip


class Lazy(Sequence[Item]):
    """Items made when they are asked for."""

    def __init__(self, count: int, make: Callable[[int], Item]) -> None:
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> Lazy: ...
    def __getitem__(self, index: int | slice) -> Item | Lazy:
        if isinstance(index, slice):
            chosen = range(self._count)[index]
            return Lazy(len(chosen), lambda i: self._make(chosen[i]))
        if not -self._count <= index < self._count:
            raise IndexError(f"item {index} of {self._count}")
        return self._make(index % self._count)

    def __iter__(self) -> Iterator[Item]:
        return (self._make(i) for i in range(self._count))


@dataclass(frozen=True)
class Kind:
    """The data of one kind: how many items there are, and how the i-th is made (its task is filled in later)."""

    train: Lazy
    test: Lazy
    licence: str
    note: str = ""
    """What was left out or cut, for the report; empty where there is nothing to tell."""


@dataclass(frozen=True)
class Multimodal:
    """Data of one to four kinds, all in the same `form`."""

    name: str
    form: Form
    kinds: Mapping[str, Kind]
    seed: int = 0

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(task for task, kind in KIND.items() if kind in self.kinds)

    @property
    def note(self) -> str:
        return "; ".join(kind.note for kind in self.kinds.values() if kind.note)

    @property
    def licence(self) -> str:
        return "; ".join(f"{name}: {kind.licence}" for name, kind in self.kinds.items())

    def train(self, task: str) -> Lazy:
        return self._items(task, held_out=False)

    def test(self, task: str) -> Lazy:
        return self._items(task, held_out=True)

    def _items(self, task: str, held_out: bool) -> Lazy:
        if task not in KIND:
            raise DataError(f"data: got the task {task!r}; expected one of {', '.join(KIND)}")
        if KIND[task] not in self.kinds:
            raise DataError(f"data: {self.name} has no {KIND[task]}, which the task {task} is made from")
        kind = self.kinds[KIND[task]]
        items = kind.test if held_out else kind.train
        return Lazy(len(items), lambda i: replace(items[i], task=task))


def load_multimodal(source: str = "embedded", seed: int = 0, form: Form | None = None) -> Multimodal:
    """The data that `source` names.

    Args:
        source: `embedded` (digits, moving digits, tones, Python's documentation), `photos` (crops of scikit-learn's two photos),
            a folder (see `raysys.data.multimodal_files`), or `embedded+FOLDER`.
        seed: decides the order of items and everything that is drawn.
        form: what everything is brought to.

    Raises:
        DataError: there is no such source, or a file of it cannot be used; one sentence.
    """
    from raysys.data import multimodal_embedded as embedded
    from raysys.data import multimodal_files as files

    form = form or Form()
    if source == "embedded":
        return Multimodal(source, form, embedded.kinds(form, seed), seed)
    if source == "photos":
        return Multimodal(source, form, {"image": embedded.photos(form, seed)}, seed)
    base, _, rest = source.partition("+")
    over = base == "embedded" and bool(rest)
    folder = Path(rest if over else source).expanduser()
    if not source or not folder.is_dir():
        raise DataError(f"data: got {source!r}; expected embedded, photos, an existing folder, or embedded+FOLDER")
    found = files.kinds(folder, form, seed)
    return Multimodal(source, form, {**embedded.kinds(form, seed), **found} if over else found, seed)
