"""What the front and the encoder of the retriever do with the requests at hand, without Ray or HTTP."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from serve.batching import Batcher
from serve.collection import Hits
from serve.encoder import RERANKED, Encoder, EncoderMeters
from serve.refusal import Refused
from serve.retriever import Front, RetrieverConfig
from serve.search_models import Query


class Remote:
    """A method of a handle."""

    def __init__(self, answer: Callable[..., Any]) -> None:
        self.answer = answer

    async def remote(self, *args: Any) -> Any:
        return self.answer(*args)


class Handle:
    """An encoder that refuses queries of one letter."""

    def __init__(self) -> None:
        self.queries = Remote(self._queries)

    def _queries(self, texts: list[str]) -> tuple[np.ndarray, list[Any]]:
        refused = [len(text) == 1 for text in texts]
        u = np.array([[0.0 if no else len(text)] for no, text in zip(refused, texts, strict=True)], np.float32)
        return u, [Refused(422, "no") if no else 0.5 for no in refused]


class Searched:
    """A collection that notes what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[float], list[int]]] = []

    async def search(self, u: np.ndarray, k: list[int]) -> list[Hits]:
        self.asked.append((u[:, 0].tolist(), list(k)))
        return [Hits("v", [float(row)], [f"d{row:g}"], ["text"]) for row in u[:, 0]]


def front(**limits: Any) -> Any:
    made: Any = object.__new__(Front)
    made.config, made.encoder, made.collection = RetrieverConfig(**limits), Handle(), Searched()
    return made


def test_only_queries_that_have_a_vector_are_searched_for() -> None:
    one = front()
    found = asyncio.run(one._hits([Query(query=q, k=k) for q, k in [("a", 9), ("bb", 2), ("c", 9), ("dddd", 4)]]))
    assert one.collection.asked == [([2.0, 4.0], [2, 4])]
    assert [isinstance(hits, Refused) or (hits.ids, hits.scores) for hits in found] == [
        True,
        (["d2"], [2.5]),
        True,
        (["d4"], [4.5]),
    ]
    assert all(isinstance(hits, Refused) for hits in asyncio.run(one._hits([Query(query="a"), Query(query="b")])))
    assert len(one.collection.asked) == 1


def test_what_the_teacher_reads_is_counted_over_a_whole_request() -> None:
    one = front(max_rerank=20, max_pairs=60)
    many = [Query(query="bb", k=20, rerank=True)] * 4
    with pytest.raises(Refused) as told:
        asyncio.run(one.search(many))
    assert (told.value.status, told.value.sentence) == (
        422,
        "rerank: got 80 documents in all; at most 60 are allowed in a request",
    )


class Slow:
    """A retriever whose teacher takes 10 ms for a document."""

    width = 1

    def __init__(self) -> None:
        self.read: list[str] = []

    def queries(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        return np.ones((len(texts), 1), np.float32), np.zeros(len(texts), np.float32)

    def rerank(self, query: str, documents: list[str]) -> np.ndarray:
        time.sleep(0.01 * len(documents))
        self.read += [f"{query} {one}" for one in documents]
        return np.array([float(one) for one in documents], np.float32)


def encoder() -> Any:
    made: Any = object.__new__(Encoder)
    made.retriever, made.meters = Slow(), EncoderMeters()
    made.answer = Batcher(made._compute, 32, 0.0)
    return made


def test_queries_wait_for_one_slice_of_reranking_at_most_and_what_was_given_up_is_not_computed() -> None:
    async def ask() -> None:
        one, documents = encoder(), [str(i) for i in range(20)]
        reranks = [asyncio.create_task(one.rerank(f"q{i}", documents)) for i in range(64)]  # 12.8 s of work
        for _ in range(5):
            await asyncio.sleep(0.03)
            read = len(one.retriever.read)
            await one.queries(["a query"])
            assert len(one.retriever.read) - read <= 2 * RERANKED
        for rerank in reranks[1:]:
            rerank.cancel()
        assert await reranks[0] == [float(i) for i in range(20)]
        left = [text for text in one.retriever.read if not text.startswith("q0 ")]
        await asyncio.sleep(0.1)
        assert [text for text in one.retriever.read if not text.startswith("q0 ")] == left
        assert len(left) < 200

    asyncio.run(ask())
