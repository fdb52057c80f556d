"""What the front and the encoder of the retriever do with the requests at hand, without Ray or HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np

from serve.collection import Hits
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
