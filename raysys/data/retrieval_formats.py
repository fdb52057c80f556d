"""Readers of published retrieval files: what a folder says, by name; `retrieval.py` turns names into numbers.

Notable choices
- A folder's format is recognised by its published file names.
- Sets of texts with labels (BANKING77, CLINC150, ESConv) become retrieval: the documents are the labels, written as phrases.
- A set that ships without a split holds out a fixed fifth: of the questions (StrategyQA), of the instructions (SayCan), of the
  judged queries (BEIR without train.tsv). Nothing of a held-out one is trained on.
- A document that is right for held-out queries and for no training query is withheld from training, in every format; one that
  is right for nothing stays known.
- What is left out is counted and told, and anything else that is wrong is refused with its file and line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raysys.data import text_formats
from raysys.data.datasets import DataError, _held_out
from raysys.data.plans import held_out_instructions, progress, read_plans

LICENCES = {
    "banking77": "CC BY 4.0",
    "clinc150": "CC BY 3.0",
    "strategyqa": "MIT",
    "saycan": "CC BY 4.0",
    "esconv": "CC BY-NC 4.0, non-commercial research; conversations about mental health, no clinical use",
}
WITHHELD_INTENTS = 17
TURNS, WORDS = 5, 80
"""Of an ESConv context: the last turns, and of those the last words, so that cutting tokens at 128 takes nothing away."""
UTTERANCE = re.compile(r"\d\.\d ([01]) \d+ (?:\[([^\]]+)\])?\s*(.*)", re.DOTALL)


@dataclass(frozen=True)
class Ask:
    """A query, and the documents that are right for it with their grades."""

    id: str
    text: str
    relevant: dict[str, int]


@dataclass
class Pool:
    """A data set as read: documents by id, queries of both splits, ids of the documents withheld from training."""

    name: str
    documents: dict[str, str]
    train: list[Ask]
    test: list[Ask]
    unseen: set[str] = field(default_factory=set)
    note: str = ""
    left_out: dict[str, int] = field(default_factory=dict)


def read_pool(path: Path) -> Pool:
    """A folder in one of the known formats.

    Raises:
        DataError: no known file is there, its partner is missing, or a file is damaged.
    """
    readers = {
        "corpus.jsonl": _beir, "train.json": _strategyqa, "saycan_plan_v0_l.tsv": _saycan,
        "devWithStrategy_short.tsv": _esconv, "data_full.json": _clinc, "data_small.json": _clinc, "train.csv": _banking,
    }  # fmt: skip
    for name, reader in readers.items():
        if (path / name).is_file():
            return _withhold(reader(path / name))
    raise DataError(f"data: the folder {path} holds none of {', '.join(readers)}")


def _withhold(pool: Pool) -> Pool:
    """Withhold what is right for held-out queries only: those who train on all known documents would see it as wrong alone."""
    trained, held = ({name for ask in asks for name in ask.relevant} for asks in (pool.train, pool.test))
    if only := held - trained - pool.unseen:
        pool.unseen |= only
        told = f"{len(only)} documents that are right for held-out queries only are withheld"
        pool.note = "; ".join(filter(None, (pool.note, told)))
    return pool


def _phrase(label: str) -> str:
    return " ".join(re.sub(r"[^a-z0-9]+", " ", label.lower()).split())


def _labelled(name: str, train: text_formats.Rows, test: text_formats.Rows, withheld: set[str], note: str) -> Pool:
    """Documents are the labels as phrases; training queries of withheld labels are left out."""
    labels = sorted({*train.label, *test.label})
    pool = Pool(name, {label: _phrase(label) for label in labels}, [], [], withheld, note)
    for part, rows, asks in (("train", train, pool.train), ("test", test, pool.test)):
        for text, label, place in zip(rows.first, rows.label, rows.place, strict=True):
            if part == "test" or label not in withheld:
                asks.append(Ask(f"{part}-{place}", text, {label: 1}))
    if dropped := len(train.label) - len(pool.train):
        pool.left_out["training queries of withheld documents"] = dropped
    return pool


def _banking(file: Path) -> Pool:
    found = text_formats.read_folder(file.parent)
    if found.name != "banking77":
        raise DataError(f"data: {file} line 1 is not the header 'text,category' of BANKING77")
    labels = sorted(set(found.train.label))
    if len(labels) <= WITHHELD_INTENTS + 1:
        raise DataError(f"data: {file} has {len(labels)} intents; {WITHHELD_INTENTS} are withheld and two must remain")
    held = _held_out(len(labels), (WITHHELD_INTENTS + 0.5) / len(labels))
    withheld = {label for label, out in zip(labels, held, strict=True) if out}
    note = f"documents are the {len(labels)} intents as phrases, {WITHHELD_INTENTS} of them, always the same, withheld"
    return _labelled("banking77", found.train, found.test, withheld, note)


def _clinc(file: Path) -> Pool:
    found = text_formats.read_clinc(file, domain=False)
    note = f"documents are the intents as phrases; {found.note}"
    return _labelled("clinc150", found.train, found.test, set(), note)


def _strategyqa(file: Path) -> Pool:
    """Geva et al. 2021: question -> the facts that it needs. The pool is every distinct fact of the file."""
    try:
        items = json.loads(text_formats._text(file))
    except json.JSONDecodeError as e:
        raise DataError(f"data: {file} line {e.lineno} is not JSON ({e.msg})") from e
    if not isinstance(items, list) or not items:
        raise DataError(f"data: {file} holds a JSON {type(items).__name__}, expected a list of questions")
    number: dict[str, str] = {}
    questions: dict[str, Ask] = {}
    for i, item in enumerate(items):
        facts: Any = item.get("facts") if isinstance(item, dict) else None
        good = isinstance(facts, list) and facts and all(isinstance(f, str) and f.strip() for f in facts)
        if not good or not isinstance(item.get("question"), str) or not item["question"].strip():
            raise DataError(f"data: {file} item {i} is {str(item)[:60]!r}, expected a question and a list of facts")
        text = " ".join(item["question"].split())
        ask = questions.setdefault(text, Ask(f"q{i}", text, {}))
        for fact in facts:
            ask.relevant[number.setdefault(" ".join(fact.split()), f"f{len(number)}")] = 1
    documents = {name: fact for fact, name in number.items()}
    train, test = _fifth(list(questions.values()))
    merged = len(items) - len(questions)
    note = f"a fixed fifth of the {len(questions)} questions held out; {merged} repeated questions merged; facts in the pool once"
    return Pool("strategyqa", documents, train, test, note=note)


def _fifth(asks: list[Ask]) -> tuple[list[Ask], list[Ask]]:
    held = _held_out(len(asks))
    return [a for a, out in zip(asks, held, strict=True) if not out], [
        a for a, out in zip(asks, held, strict=True) if out
    ]


def _esconv(file: Path) -> Pool:
    """Liu et al. 2021, trained on the development file: the latest turns, without their strategies -> that of the reply."""
    test_file = file.with_name("testWithStrategy_short.tsv")
    if not test_file.is_file():
        raise DataError(f"data: {file} needs {test_file}, which is missing")
    documents: dict[str, str] = {}
    sides: list[list[Ask]] = []
    alone = 0
    for part, path in (("train", file), ("test", test_file)):
        sides.append([])
        for number, line in enumerate(text_formats._lines(path), start=1):
            if not line.strip():
                continue
            turns = [UTTERANCE.fullmatch(turn.strip()) for turn in line.split(" EOS ")]
            strategy = turns[-1][2] if turns[-1] else None
            if strategy is None or not all(turns):
                expected = "utterances 'WEIGHT SPEAKER TURN text' joined by EOS, the last with [Strategy]"
                raise DataError(f"data: {path} line {number} is {line[:60]!r}, expected {expected}")
            said = [f"{('seeker', 'supporter')[int(t[1])]}: {' '.join(t[3].split())}" for t in turns[:-1] if t]
            text = " ".join(" ".join(said[-TURNS:]).split()[-WORDS:])
            if not text:
                alone += 1
                continue
            documents.setdefault(strategy, strategy.lower())
            sides[-1].append(Ask(f"{part}-{number}", text, {strategy: 1}))
    note = f"trained on {file.name}, tested on {test_file.name}; query: the last {TURNS} turns, at most {WORDS} words"
    pool = Pool("esconv", dict(sorted(documents.items())), sides[0], sides[1], note=note)
    pool.left_out |= {"replies without anything before them": alone} if alone else {}
    return pool


def _saycan(file: Path) -> Pool:
    """Ahn et al. 2022: instruction and the steps so far -> the next skill."""
    plans = read_plans(file)
    held = held_out_instructions([instruction for _, instruction, _ in plans])
    pool = Pool("saycan", {}, [], [], note=f"a fixed fifth of the instructions held out: {len(held)}")
    for line, instruction, skills in plans:
        part = "test" if instruction in held else "train"
        for i, skill in enumerate(skills):
            pool.documents.setdefault(skill, skill)
            getattr(pool, part).append(Ask(f"{part}-{line}-{i + 1}", progress(instruction, skills[:i]), {skill: 1}))
    pool.documents = dict(sorted(pool.documents.items()))
    return pool


def _beir(file: Path) -> Pool:
    """Thakur et al. 2021: corpus.jsonl, queries.jsonl and qrels/train.tsv, test.tsv (dev.tsv where there is no test.tsv)."""
    folder = file.parent
    pool = Pool(folder.name, {}, [], [])
    empty: set[str] = set()
    for line, name, record in _named(file):
        title, text = (record.get(key) or "" for key in ("title", "text"))
        if not isinstance(title, str) or not isinstance(text, str):
            raise DataError(f"data: {file} line {line}: title and text must be text")
        if name in pool.documents or name in empty:
            raise DataError(f"data: {file} line {line}: the _id {name!r} occurs twice")
        if whole := " ".join(f"{title} {text}".split()):
            pool.documents[name] = whole
        else:
            empty.add(name)
    queries: dict[str, str] = {}
    queries_file = folder / "queries.jsonl"
    if not queries_file.is_file():
        raise DataError(f"data: {file} needs {queries_file}, which is missing")
    for line, name, record in _named(queries_file):
        text = record.get("text")
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"data: {queries_file} line {line}: text is {text!r}, expected text")
        queries[name] = " ".join(text.split())
    parts = {name: folder / "qrels" / f"{name}.tsv" for name in ("train", "dev", "test")}
    tested = next((name for name in ("test", "dev") if parts[name].is_file()), None)
    if tested is None:
        raise DataError(f"data: {file} needs {parts['test']} or dev.tsv, which are missing")
    pool.left_out = {"documents without text": len(empty)} if empty else {}
    pool.test = _judged(parts[tested], queries, pool, empty)
    if parts["train"].is_file():
        pool.train = _judged(parts["train"], queries, pool, empty)
        pool.note = "" if tested == "test" else "tested on dev.tsv"
    else:
        pool.train, pool.test = _fifth(pool.test)
        pool.note = f"no train.tsv: a fixed fifth of the queries of {tested}.tsv held out, the others train"
    return pool


def _named(file: Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    for line, record in text_formats._json_records(file):
        name = record.get("_id")
        if not isinstance(name, str) or not name:
            raise DataError(f"data: {file} line {line}: _id is {name!r}, expected a name")
        yield line, name, record


def _judged(file: Path, queries: dict[str, str], pool: Pool, empty: set[str]) -> list[Ask]:
    """The queries of a qrels file, in its order; a score of 0 or less says not relevant."""
    lines = text_formats._lines(file)
    if lines[0].split("\t") != ["query-id", "corpus-id", "score"]:
        raise DataError(
            f"data: {file} line 1 is {lines[0][:60]!r}, expected the header query-id, corpus-id, score with tabs"
        )
    asks: dict[str, Ask] = {}
    for number, line in enumerate(lines[1:], start=2):
        if not line.strip():
            continue
        values = line.split("\t")
        if len(values) != 3 or not re.fullmatch(r"-?\d{1,6}", values[2].strip()):
            raise DataError(f"data: {file} line {number} is {line[:60]!r}, expected query, document and a whole number")
        query, document, score = values[0], values[1], int(values[2])
        if query not in queries:
            raise DataError(f"data: {file} line {number}: the query {query!r} is not in queries.jsonl")
        if document not in pool.documents and document not in empty:
            raise DataError(f"data: {file} line {number}: the document {document!r} is not in corpus.jsonl")
        ask = asks.setdefault(query, Ask(query, queries[query], {}))
        if score > 0 and document in pool.documents:
            ask.relevant[document] = score
    judged = [ask for ask in asks.values() if ask.relevant]
    if barren := len(asks) - len(judged):
        reason = f"queries of {file.name} without a relevant document"
        pool.left_out[reason] = barren
    return judged
