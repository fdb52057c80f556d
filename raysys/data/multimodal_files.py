"""Folders of text, images, video frames and sound, brought to one form.

    FOLDER/text/*.txt            pieces; the last tenth of each file is held out
    FOLDER/images/*.png|jpg      caption in NAME.txt, or in labels.csv (columns file, caption, others are facts)
    FOLDER/video/CLIP/*.png|jpg  frames in the order of their names, caption in CLIP.txt or CLIP/caption.txt
    FOLDER/audio/*.wav           caption in NAME.txt, or the name {digit}_{speaker}_{index}.wav of the Free Spoken Digit Dataset

Without such a subfolder the files of that kind are looked for in FOLDER itself.

Notable choices
- Held out: of images, clips and sounds those at places 0, 5, 10, ... in the order of their names, so that all captions of a
  picture are in one split; of spoken digits those with index 0 to 4, which is that data set's own split; of text the end of each
  file, so that no held-out piece has a trained one after it.
- Pictures are cut to the canvas' proportions around their middle, then resized. Sounds become one channel, are resampled (a
  polyphase filter), brought to one loudness, and cut or padded with silence at the end; how many were cut is said in `note`.
- Headers are checked when a folder is opened, contents when an item is made. Names in labels.csv and links may not lead out of
  the folder. What is read and decoded is bounded in `raysys.data.media`.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from raysys.data.datasets import DataError
from raysys.data.media import PICTURES, picture_size, read_picture, read_sound, read_text, sound_size
from raysys.data.multimodal import Form, Item, Kind, Lazy
from raysys.data.multimodal_embedded import NAMES, of_texts, pieces
from raysys.runtime.seeds import Seeds, Stream

SPOKEN = re.compile(r"([0-9])_([A-Za-z]+)_(\d+)")
EVERY = 5
MOST_CAPTION = 2000
"""Characters of a caption."""
UNKNOWN = "unknown, the folder's owner knows"
Make = Callable[[], Item]


def kinds(folder: Path, form: Form, seed: int) -> dict[str, Kind]:
    """What a folder has; DataError if it has nothing, or a file that cannot be used."""
    readers = {"text": _texts, "image": _images, "video": _clips, "audio": _sounds}
    places = {"text": "text", "image": "images", "video": "video", "audio": "audio"}
    made = {}
    for name, read in readers.items():
        own = folder / places[name]
        kind = read(_inside(own, folder) if own.is_dir() else folder, form, seed)
        if kind is not None:
            made[name] = kind
    if not made:
        raise DataError(
            f"data: {folder} has no .txt, .png, .jpg or .wav files, nor folders text, images, video or audio"
        )
    return made


def _texts(folder: Path, form: Form, seed: int) -> Kind | None:
    media = {p.stem for p in folder.iterdir() if p.suffix.lower() in (*PICTURES, ".wav") or p.is_dir()}
    files = [p for p in _files(folder, (".txt",)) if p.stem not in media]
    train, test = list[str](), list[str]()
    for file in files:
        found = pieces(read_text(file), form.piece)
        border = len(found) - (len(found) // 10 or (len(found) > 1))
        train += found[:border]
        test += found[border:]
    if not files:
        return None
    if not train or not test:
        raise DataError(
            f"data: the texts in {folder} are too short; expected more than {form.piece} characters in a file"
        )
    return of_texts(train, test, UNKNOWN)


def _images(folder: Path, form: Form, seed: int) -> Kind | None:
    labels = folder / "labels.csv"
    if labels.is_file():
        rows = _labels(labels)
    else:
        files = _files(folder, PICTURES)
        rows = [(file, _caption(file), {}) for file in files]
    if not rows:
        return None
    for file, _, _ in rows:
        picture_size(file)
    made: list[Make] = [partial(_picture, file, text, facts, form) for file, text, facts in rows]
    return _split(folder, made, _by_name([file.resolve() for file, _, _ in rows]), seed, 0, UNKNOWN, "")


def _clips(folder: Path, form: Form, seed: int) -> Kind | None:
    if folder.name != "video":
        return None
    made = []
    for clip in sorted(_inside(p, folder) for p in folder.iterdir() if p.is_dir()):
        files = _files(clip, PICTURES)
        if len(files) < form.frames:
            raise DataError(f"data: {clip} has {len(files)} frames; expected at least {form.frames} .png or .jpg files")
        text = _caption(clip / "caption.txt" if (clip / "caption.txt").is_file() else clip)
        for file in files:
            picture_size(file)
        for first in range(0, len(files) - form.frames + 1, form.frames):  # a long clip is several, one after the other
            made.append((clip, partial(_clip, files[first : first + form.frames], text, form)))
    if not made:
        return None
    held_out = _by_name([clip.resolve() for clip, _ in made])  # windows of one clip stay together
    return _split(folder, [make for _, make in made], held_out, seed, 1, UNKNOWN, "")


def _sounds(folder: Path, form: Form, seed: int) -> Kind | None:
    files = _files(folder, (".wav",))
    if not files:
        return None
    made, held_out, cut, spoken = list[Make](), list[bool](), 0, True
    for number, file in enumerate(files):
        rate, count = sound_size(file)
        cut += count * form.rate > form.samples * rate
        match = SPOKEN.fullmatch(file.stem)
        own = file.with_suffix(".txt")
        if match and not own.is_file():
            text, facts = NAMES[int(match[1])], {"digit": match[1], "speaker": match[2]}
        else:
            text, facts, spoken = _caption(file), {}, False
        held_out.append(int(match[3]) < 5 if match else number % EVERY == 0)
        made.append(partial(_sound, file, text, facts, form))
    seconds = form.samples / form.rate
    note = f"{cut} of {len(files)} sounds are longer than {seconds:g} s and were cut at their end" if cut else ""
    licence = "Free Spoken Digit Dataset (CC BY-SA 4.0)" if spoken else UNKNOWN
    return _split(folder, made, held_out, seed, 2, licence, note)


def _picture(file: Path, text: str, facts: dict[str, str], form: Form) -> Item:
    return Item("", text, read_picture(file, form)[None], facts=facts)


def _clip(files: list[Path], text: str, form: Form) -> Item:
    return Item("", text, np.stack([read_picture(file, form) for file in files]))


def _sound(file: Path, text: str, facts: dict[str, str], form: Form) -> Item:
    return Item("", text, wave=read_sound(file, form), facts=facts)


def _made(making: list[Make], index: int) -> Item:
    return making[index]()


def _by_name(sources: list[Path]) -> list[bool]:
    """Whether each item is held out: every fifth of the different sources is, in the order of their names."""
    out = {source: i % EVERY == 0 for i, source in enumerate(sorted(set(sources)))}
    return [out[source] for source in sources]


def _split(
    folder: Path, made: list[Make], held_out: list[bool], seed: int, round: int, licence: str, note: str
) -> Kind:  # fmt: skip
    """Both splits in an order drawn from the seed."""
    parts = []
    for wanted in (False, True):
        which = [make for make, out in zip(made, held_out, strict=True) if out == wanted]
        if not which:
            raise DataError(f"data: {folder} has {len(made)} items, all in one split; expected at least two")
        order = Seeds(seed).rng(Stream.SHUFFLE, 1 + round, wanted).permutation(len(which))
        parts.append(Lazy(len(which), partial(_made, [which[i] for i in order])))
    return Kind(parts[0], parts[1], licence, note)


def _labels(table: Path) -> list[tuple[Path, str, dict[str, str]]]:
    reader = csv.DictReader(io.StringIO(read_text(table)), strict=True)
    rows = []
    try:
        if not {"file", "caption"} <= set(reader.fieldnames or ()):
            raise DataError(f"data: {table} has the columns {reader.fieldnames}; expected file and caption among them")
        for row in reader:
            where = f"{table} line {reader.line_num}"
            if None in row or None in row.values():
                raise DataError(f"data: {where} has another number of fields than the header")
            name, text = row.pop("file"), row.pop("caption")
            file = table.parent / name
            if not name or Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
                raise DataError(f"data: {where} names {name!r}; expected a file inside {table.parent}")
            if file.suffix.lower() not in PICTURES or not file.is_file():
                raise DataError(f"data: {where} names {name!r}; there is no such .png or .jpg file")
            rows.append((_inside(file, table.parent), _plain(text, where), dict(row)))
    except csv.Error as error:
        raise DataError(f"data: {table} is not a CSV table ({error})") from error
    if not rows:
        raise DataError(f"data: {table} has no rows")
    return rows


def _files(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Files of these suffixes, by name; links that lead out of the folder are refused."""
    return [_inside(p, folder) for p in sorted(folder.iterdir()) if p.suffix.lower() in suffixes and p.is_file()]


def _inside(file: Path, folder: Path) -> Path:
    if not file.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"data: {file} is a link that leads out of {folder}")
    return file


def _caption(file: Path) -> str:
    """The text in the file of the same name with .txt."""
    own = file if file.suffix == ".txt" else file.with_name(f"{file.name if file.is_dir() else file.stem}.txt")
    if not own.is_file():
        raise DataError(f"data: {file} has no caption; expected {own.name} beside it")
    return _plain(read_text(_inside(own, own.parent)), str(own))


def _plain(text: str, where: str) -> str:
    text = " ".join(text.split())
    if not 1 <= len(text) <= MOST_CAPTION:
        raise DataError(f"data: {where} has a caption of {len(text)} characters; expected 1 to {MOST_CAPTION}")
    return text
