"""Retrieval data: a pool of documents, queries of a train and a test split, and which documents are right for each.

Shapes: m documents, n queries of a split. Texts stay text here.

Notable choices
- The name says where the data comes from: `rationale`, `facts`, `skills` (generated), or a folder of published files.
- Several documents may be right for a query, to a degree (`grades`); a query without any is left out and counted.
- A document that is the query itself (same id or same text, as in BEIR's ArguAna) is no candidate for it (`itself`), unless it is
  judged right: leaving such documents in is a known fault of published scores.
- `unseen` documents were withheld from training on purpose, with all queries that lead to them; a trainer uses `known` ones only.
- Ids have no white space, so that a TREC run can be written: where a set's names are phrases (SayCan), they are joined by `-`.
- What was left out, merged or held out is said in `note`, with counts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from raysys.data.datasets import DataError
from raysys.data.facts import Facts
from raysys.data.rationales import Rationale
from raysys.data.retrieval_formats import LICENCES, Ask, Pool, read_pool
from raysys.data.skills import Skills

I64 = NDArray[np.int64]
Kind = Literal["rationale", "facts", "real"]
GENERATED: dict[str, Any] = {"rationale": Rationale, "facts": Facts, "skills": Skills}


@dataclass(frozen=True)
class Queries:
    """n queries of a split."""

    ids: tuple[str, ...]
    texts: tuple[str, ...]
    relevant: tuple[tuple[int, ...], ...]
    """The documents that are right for each query, by index, ascending; never none."""
    grades: tuple[tuple[int, ...], ...]
    """How right each of them is, at least 1; same lengths as `relevant`."""
    itself: I64
    """(n,) the document that is the query itself and therefore no candidate, or -1."""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Retrieval:
    """A pool of m documents and the queries of two splits."""

    name: str
    licence: str
    document_ids: tuple[str, ...]
    documents: tuple[str, ...]
    train: Queries
    test: Queries
    unseen: NDArray[np.bool_]
    """(m,) documents withheld from training on purpose; right for no training query."""
    kind: Kind
    note: str = ""

    @property
    def known(self) -> I64:
        """Indices of the documents that a trainer may use."""
        return np.flatnonzero(~self.unseen)


def load_retrieval(source: str) -> Retrieval:
    """The retrieval data that `source` names.

    Args:
        source: `rationale`, `facts` or `skills`, generated, with options in brackets such as `rationale(documents=384, seed=1)`,
            see raysys.data.rationales, .facts and .skills; or a folder: BEIR (corpus.jsonl, queries.jsonl, qrels/*.tsv),
            StrategyQA (train.json), BANKING77, CLINC150, ESConv or SayCan plans, as published.
    Raises:
        DataError: the source does not exist or cannot be read; one sentence with the file, the line and what was expected.
    """
    if (match := re.match(r"(\w+)\s*(\(|$)", source)) and match[1] in GENERATED:
        return _generated(match[1], source)
    path = Path(source).expanduser()
    if not source or not path.is_dir():
        allowed = ", ".join(f"{name}, {name}(...)" for name in GENERATED)
        raise DataError(f"data: got {source!r}, which is neither {allowed} nor an existing folder")
    return assemble(read_pool(path), "real")


def assemble(pool: Pool, kind: Kind, licence: str = "") -> Retrieval:
    """What was read or made, by index.

    Raises:
        DataError: a split has no query with a right document in the pool.
    """
    ids, documents = tuple(pool.documents), tuple(pool.documents.values())
    number = {name: i for i, name in enumerate(ids)}
    by_text = {text: i for i, text in reversed(list(enumerate(documents)))}
    train, test = (
        _queries(part, asks, number, by_text, pool.name) for part, asks in (("train", pool.train), ("test", pool.test))
    )
    unseen = np.array([name in pool.unseen for name in ids], bool)
    told = [pool.note, *(f"left out: {count} {what}" for what, count in pool.left_out.items())]
    if unseen.any():
        told.append(f"{int(unseen.sum())} documents withheld from training")
    if itself := int((train.itself >= 0).sum() + (test.itself >= 0).sum()):
        told.append(f"{itself} queries are documents themselves, which are no candidates for them")
    if again := len([text for text in test.texts if text in set(train.texts)]) if kind == "real" else 0:
        told.append(f"{again} test queries read like a training query")
    told.append(f"candidates: all {len(ids)} documents")
    licence = licence or LICENCES.get(pool.name, "not known to raysys")
    return Retrieval(
        pool.name, licence, slugs(ids), documents, train, test, unseen, kind, "; ".join(filter(None, told))
    )


def _queries(part: str, asks: Sequence[Ask], number: dict[str, int], by_text: dict[str, int], name: str) -> Queries:
    if not asks:
        raise DataError(f"data: {name} has no {part} query with a right document")
    relevant, grades, itself = [], [], []
    for ask in asks:
        judged = sorted((number[document], grade) for document, grade in ask.relevant.items())
        relevant.append(tuple(i for i, _ in judged))
        grades.append(tuple(grade for _, grade in judged))
        own = number.get(ask.id, by_text.get(ask.text, -1))
        itself.append(-1 if own in relevant[-1] else own)
    ids, texts = slugs([ask.id for ask in asks]), tuple(ask.text for ask in asks)
    return Queries(ids, texts, tuple(relevant), tuple(grades), np.array(itself, np.int64))


def slugs(names: Sequence[str]) -> tuple[str, ...]:
    """Names as TREC files can hold them: white space becomes `-`, with a number where that is another's name already."""
    taken, made = {name for name in names if len(name.split()) == 1 and name == name.strip()}, []
    for name in names:
        slug = name
        if name not in taken:
            base, number = "-".join(name.split()) or "-", 1
            slug = base
            while slug in taken:
                number += 1
                slug = f"{base}-{number}"
            taken.add(slug)
        made.append(slug)
    return tuple(made)


def generator(source: str) -> Any:
    """What generates the data of `NAME` or `NAME(option=value, ...)`: a Rationale, Facts or Skills.

    Raises:
        DataError: there is no such name or option, or a value cannot be.
    """
    match = re.fullmatch(r"(\w+)\s*(?:\((.*)\))?\s*", source)
    name = re.split(r"\W", source)[0]
    if name not in GENERATED:
        raise DataError(f"data: got {source!r}; allowed are {', '.join(GENERATED)}")
    task = GENERATED[name]
    types: dict[str, Callable[[str], Any]] = {f.name: int if f.type == "int" else float for f in fields(task)}
    values: dict[str, Any] = {}
    for item in filter(str.strip, (match[2] or "").split(",") if match else [source]):
        option, _, value = (part.strip() for part in item.partition("="))
        try:
            values[option] = types[option](value)
        except (KeyError, ValueError):
            allowed = ", ".join(f"{f.name}={str(f.type).upper()}" for f in fields(task))
            raise DataError(f"data: got {source!r}; {item.strip()!r} is none of {allowed}") from None
    try:
        return task(**values)
    except ValueError as e:
        raise DataError(f"data: got {source!r}; {e}") from None


def _generated(name: str, source: str) -> Retrieval:
    task = generator(source)
    try:
        made = task.generate()
    except ValueError as e:
        raise DataError(f"data: got {source!r}; {e}") from None
    documents = {f"d{i}": text for i, text in enumerate(made.documents)}
    asks = [
        [
            Ask(f"{part}-{i}", text, {f"d{a}": 1})
            for i, (text, a) in enumerate(zip(asked.texts, asked.answer, strict=True))
        ]
        for part, asked in (("train", made.train), ("test", made.test))
    ]
    unseen = {f"d{i}" for i in np.flatnonzero(made.unseen)}
    kind: Kind = "facts" if name == "facts" else "rationale"
    return assemble(Pool(name, documents, asks[0], asks[1], unseen), kind, "generated, no external text")


def write_run(
    ids: Sequence[str], scores: NDArray[np.float32], document_ids: Sequence[str], tag: str, depth: int = 1000
) -> str:
    """The `depth` best documents of each query as lines of a TREC run: query, Q0, document, rank, score, tag.

    Args:
        ids, document_ids: of the n queries and m documents, without white space.
        scores: (n, m); -inf is no candidate. Equal scores stay in the order of the documents.
    Raises:
        ValueError: a name has white space or is empty, shapes disagree, a score is nan, or depth is below 1.
    """
    if scores.shape != (len(ids), len(document_ids)):
        raise ValueError(f"scores: got shape {scores.shape}; expected ({len(ids)}, {len(document_ids)})")
    if np.isnan(scores).any():
        raise ValueError("scores: got nan; a score must be a number or -inf")
    if depth < 1:
        raise ValueError(f"depth: got {depth}; it must be at least 1")
    for name in (*ids, *document_ids, tag):
        if not name or len(name.split()) != 1 or name != name.strip():
            raise ValueError(f"run: got the name {name!r}; TREC names are not empty and have no white space")
    lines = []
    for query, row in zip(ids, scores, strict=True):
        for rank, i in enumerate(np.argsort(-row, kind="stable")[:depth], start=1):
            if row[i] > -np.inf:
                lines.append(f"{query} Q0 {document_ids[i]} {rank} {float(row[i]):.9g} {tag}\n")
    return "".join(lines)
