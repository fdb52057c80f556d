"""An index of a corpus for serve.retriever: Ray Data reads and encodes, the index is written in chunks and can be gone on with.

Notable choices
- The corpus is cut into chunks of --chunk documents, numbered in its order. Each chunk is written whole and checked when it is
  found again, so a killed build goes on (`--resume RUN`) where it was.
- Documents are encoded by actors that hold the teacher; what is stored is its state after the document, which no later
  student changes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field

from jobs.cli import ClusterJob
from raysys.data.retrieval import load_retrieval
from raysys.runtime.progress import Progress
from raysys.runtime.run import Run
from raysys.runtime.sentences import UserError
from raysys.runtime.session import Session
from raysys.runtime.statistics import Interval
from raysys.systems.rabtriever.artifact import Retriever
from raysys.systems.rabtriever.build import Builder, digest_of
from raysys.systems.rabtriever.prompt import plain
from raysys.systems.rabtriever.versions import MOST_SHARDS, local, publish


class IndexConfig(ClusterJob):
    """Build and publish an index of a corpus with a run's retriever."""

    run: str = ""
    """Run folder (path or URI) whose retriever encodes."""
    corpus: str = "rationale"
    """A .jsonl file of {"_id" or "id", "text"[, "title"]} lines, or any data set that train takes: its documents."""
    index: str = ""
    """Folder of the index (all its versions); INDEX of serve.retriever. By default index/ in this run's folder."""
    version: str = "v1"
    """Name of the version that is built."""
    kind: Literal["flat", "hnsw"] = "flat"
    """flat: exact search; hnsw: a graph, for large corpora."""
    shards: int = Field(1, ge=1, le=MOST_SHARDS)
    """Shards that documents are dealt to."""
    chunk: int = Field(10_000, ge=1)
    """Documents per chunk: what a kill can cost."""
    encoders: int = Field(1, ge=1, le=10_000)
    """Actors that encode."""
    batch: int = Field(512, ge=1)
    """Documents that an actor encodes at once."""
    publish: bool = True
    """Make it the current version when it is done."""
    seeds: int = Field(1, ge=1, le=10_000)
    """Not used: nothing here is random."""

    def check(self) -> None:
        if not self.run:
            raise ValueError("run: is missing; expected the folder of a run that train made")
        if self.index:
            local(self.index)
        read_corpus(self.corpus)
        Retriever.load(self.run)


def build_index(config: IndexConfig, run: Run, session: Session) -> None:
    """Encode what is not there yet, chunk by chunk, then finish and publish."""
    import ray.data  # takes seconds, and no other command needs it

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    session.release()
    retriever = Retriever.load(config.run)
    if config.index:
        root = local(config.index)
    elif run.storage.local is not None:
        root = run.storage.local / "index"
    else:
        raise UserError(f"index: is missing; a run at {run.path} has no folder of its own on this machine, name one")
    if run.stage("index").result is not None:
        return
    ids, texts = read_corpus(config.corpus)
    source = digest_of([config.chunk, *zip(ids, texts, strict=True)])
    # A build that was killed after its last step left a whole version: one of the same documents is what this run has made.
    builder = Builder(
        root, config.version, retriever.width, retriever.fingerprint, config.shards, config.kind, source, run.resumed
    )
    if not builder.done:
        starts = range(0, len(ids), config.chunk)
        missing = [number for number, _ in enumerate(starts) if not builder.has(number)]
        with Progress(len(starts), "index", unit="chunks", done=len(starts) - len(missing)) as progress:
            for number, vectors in encoded(config, texts, missing):
                rows = slice(number * config.chunk, (number + 1) * config.chunk)
                builder.put(number, ids[rows], texts[rows], vectors)
                progress.advance()
        builder.finish()
    folder = builder.target
    if config.publish:
        publish(root, config.version)
    told = {
        "index": str(root),
        "version": config.version,
        "documents": len(ids),
        "kind": config.kind,
        "shards": config.shards,
    }
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    run.row("bytes on disk", Interval(float(size), None, None, 1), **told)
    run.grid(
        "Index",
        [
            told
            | {"MB": f"{size / 1e6:.1f}", "served with": f"python -m serve.retriever --run {config.run} --index {root}"}
        ],
    )
    run.stage("index").finish(told)


def encoded(config: IndexConfig, texts: list[str], missing: list[int]) -> Iterator[tuple[int, np.ndarray]]:
    """Vectors (m, d) of the missing chunks, in order, as Ray Data delivers them."""
    import ray.data

    if not missing:
        return
    rows = [
        {"chunk": number, "row": row, "text": texts[row]}
        for number in missing
        for row in range(number * config.chunk, min(len(texts), (number + 1) * config.chunk))
    ]
    data = ray.data.from_items(rows, override_num_blocks=max(1, min(len(rows) // config.batch, 4 * config.encoders)))
    stream = data.map_batches(
        Encode, fn_constructor_kwargs={"run": config.run}, batch_size=config.batch, batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=config.encoders), num_cpus=config.cluster.cpus_per_host,
        num_gpus=config.cluster.gpus_per_host or None,
    )  # fmt: skip
    waiting: dict[int, dict[int, np.ndarray]] = {}
    sizes = {number: min(len(texts), (number + 1) * config.chunk) - number * config.chunk for number in missing}
    for batch in stream.iter_batches(batch_size=None, batch_format="numpy"):
        for number, row, vector in zip(batch["chunk"], batch["row"], batch["vector"], strict=True):
            waiting.setdefault(int(number), {})[int(row)] = vector
        for number in [n for n, found in waiting.items() if len(found) == sizes[n]]:
            found = waiting.pop(number)
            yield number, np.stack([found[row] for row in sorted(found)]).astype(np.float32)


class Encode:
    """An actor of Ray Data that turns texts into vectors."""

    def __init__(self, run: str) -> None:
        torch.set_num_threads(1)
        self.retriever = Retriever.load(run, "cuda" if torch.cuda.is_available() else "cpu")

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        vectors = self.retriever.documents([str(text) for text in batch["text"]])
        return {"chunk": batch["chunk"], "row": batch["row"], "vector": vectors}


def is_file(corpus: str) -> bool:
    """Whether a corpus is named by its file."""
    return corpus.endswith(".jsonl") and os.path.isfile(corpus)


def read_corpus(corpus: str) -> tuple[list[str], list[str]]:
    """Ids and texts of a corpus, each id once.

    Raises:
        UserError: a line cannot be read, lacks an id or a text, or repeats an id.
    """
    if not is_file(corpus):
        data = load_retrieval(corpus)
        for name, text in zip(data.document_ids, data.documents, strict=True):
            if not plain(text):
                raise UserError(f"corpus: the document {name!r} of {corpus} has no words that a model could read")
        return list(data.document_ids), list(data.documents)
    found: dict[str, str] = {}
    with open(corpus, encoding="utf-8") as file:
        for line, words in enumerate(file, 1):
            if not words.strip():
                continue
            name, text = _document(corpus, line, words)
            if name in found:
                raise UserError(f"corpus: {corpus} line {line} has the id {name!r}, which an earlier line has")
            found[name] = text
    if not found:
        raise UserError(f"corpus: got {corpus}; it holds no document")
    return list(found), list(found.values())


def _document(corpus: str, line: int, words: str) -> tuple[str, str]:
    try:
        told = json.loads(words)
        name, text, title = told.get("_id", told.get("id")), told["text"], told.get("title")
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f'corpus: {corpus} line {line} is not {{"_id": ..., "text": ...}} ({error})') from error
    for field, value, kinds in (("_id", name, (str, int)), ("text", text, str), ("title", title, (str, type(None)))):
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise UserError(f"corpus: {corpus} line {line} has {field} {json.dumps(value)[:80]}; expected a text")
    whole = f"{title or ''} {text}".strip()
    if name == "" or not plain(whole):
        raise UserError(
            f"corpus: {corpus} line {line} has {'no id' if name == '' else 'no words that a model could read'}"
        )
    return str(name), whole
