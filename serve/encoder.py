"""A replica that holds the retriever: queries and documents to vectors, and the teacher that reads both together.

Whatever is asked for passes one queue and one thread, a batch at a time (serve/batching.py). The teacher reads RERANKED documents
at a time, and only while no query or document waits: a search is held up by one such slice at most, and whoever gives up is not
computed further. Refusals are returned, not raised: Ray logs what is raised, and a text must not get into a log.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import ray
import torch
from prometheus_client import Counter, Histogram
from ray import serve as ray_serve

from raysys.runtime.sentences import UserError
from raysys.systems.rabtriever.index import F32
from serve.batching import Batcher
from serve.meters import LATENCIES_S, Meters, Snapshot
from serve.refusal import Refused

Load = Callable[[str, str], Any]
"""Run and device to an object like raysys.systems.rabtriever.artifact.Retriever."""
RERANKED = 4
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Work(NamedTuple):
    """One thing to compute: `kind` is query, document or rerank (the documents of `text`, as a query)."""

    kind: str
    text: str
    documents: tuple[str, ...] = ()


class EncoderMeters(Meters):
    """Metrics of an encoder replica."""

    def __init__(self) -> None:
        super().__init__()
        own = self.registry
        self.batch = Histogram("raysys_encoder_batch_size", "Texts in a batch.", ["kind"], buckets=SIZES, registry=own)
        self.seconds = Histogram(
            "raysys_encoder_seconds", "Time of a batch.", ["kind"], buckets=LATENCIES_S, registry=own
        )
        self.refused = Counter("raysys_encoder_refused", "Texts that the model takes no vector from.", registry=own)


def load_artifact(run: str, device: str) -> Any:
    """The retriever of a run."""
    from raysys.systems.rabtriever.artifact import Retriever

    return Retriever.load(run, device)


class Encoder:
    """The retriever, and the queue in front of it."""

    def __init__(self, run: str, fingerprint: str, max_batch: int, load: Load) -> None:
        context = ray.get_runtime_context()
        torch.set_num_threads(max(1, int(context.get_assigned_resources().get("CPU", 1))))
        self.retriever = load(run, "cuda" if context.get_accelerator_ids().get("GPU") else "cpu")
        if self.retriever.fingerprint != fingerprint:
            raise UserError(mismatch(run, self.retriever.fingerprint, fingerprint))
        self.meters = EncoderMeters()
        self.answer: Batcher[Work, Any] = Batcher(self._compute, max_batch, 0.0)

    def _compute(self, work: list[Work]) -> list[Any]:
        out: list[Any] = [None] * len(work)
        for kind in dict.fromkeys(one.kind for one in work):
            rows = [i for i, one in enumerate(work) if one.kind == kind]
            began = time.perf_counter()
            for i, result in zip(rows, self._kind(kind, [work[i] for i in rows]), strict=True):
                out[i] = result
            self.meters.seconds.labels(kind).observe(time.perf_counter() - began)
            self.meters.batch.labels(kind).observe(len(rows))
        return out

    def _kind(self, kind: str, work: list[Work]) -> list[Any]:
        try:
            if kind == "rerank":
                return [finite(self.retriever.rerank(one.text, list(one.documents))) for one in work]
            texts = [one.text for one in work]
            if kind == "document":
                return list(finite(self.retriever.documents(texts)))
            u, c = self.retriever.queries(texts)
            return list(zip(finite(u), finite(c).tolist(), strict=True))
        except (ValueError, UserError) as error:
            if len(work) > 1:
                return [self._kind(kind, [one])[0] for one in work]  # one that is refused must not fail the others
            self.meters.refused.inc()
            return [Refused(422, f"{'documents' if kind == 'document' else 'query'}: the model takes it not ({error})")]

    async def queries(self, texts: Sequence[str]) -> tuple[F32, list[float | Refused]]:
        """u (n, d), and c of each query or why it has no vector (its row of u is zero then)."""
        made = await asyncio.gather(*(self.answer(Work("query", text)) for text in texts))
        u = np.zeros((len(texts), self.retriever.width), np.float32)
        for row, one in zip(u, made, strict=True):
            if not isinstance(one, Refused):
                row[:] = one[0]
        return u, [one if isinstance(one, Refused) else one[1] for one in made]

    async def documents(self, texts: Sequence[str]) -> F32 | Refused:
        """z (n, d), or why one of them has none."""
        made = await asyncio.gather(*(self.answer(Work("document", text)) for text in texts))
        return next((one for one in made if isinstance(one, Refused)), None) or np.stack(made)

    async def rerank(self, query: str, documents: Sequence[str]) -> list[float] | Refused:
        """The teacher's log-odds of each document."""
        scores: list[float] = []
        for start in range(0, len(documents), RERANKED):
            some = tuple(documents[start : start + RERANKED])
            made = await self.answer(Work("rerank", query, some), later=True)
            if isinstance(made, Refused):
                return made
            scores += made.tolist()
        return scores

    async def prompts(self, query: str, documents: Sequence[str]) -> list[str]:
        """What the teacher is asked about each document."""
        return [self.retriever.prompt(query, document) for document in documents]

    async def snapshot(self) -> tuple[str, Snapshot]:
        """This replica's name and metrics."""
        return ray_serve.get_replica_context().replica_tag, self.meters.snapshot()


def finite(numbers: F32) -> F32:
    """The numbers; ArithmeticError if one is not finite."""
    if not np.isfinite(numbers).all():
        raise ArithmeticError("the model gave numbers that are not finite")
    return numbers


def mismatch(run: str, got: str, expected: str) -> str:
    """What is said where the vectors of a run and those of an index cannot be compared."""
    return (
        f"run: got {run}, whose vectors have the fingerprint {got[:12]}; the index has {expected[:12]}, build one with this run"
        " (python -m jobs.rabtriever index)"
    )
