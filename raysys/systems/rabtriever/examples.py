"""Which queries and documents a training step looks at: functions of (seed, step, block) and nothing else.

Shapes: n training queries, m documents, of which m_k are known to training; b queries per block, K documents each.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raysys.data.retrieval import Retrieval
from raysys.runtime.seeds import Seeds, Stream

I64 = NDArray[np.int64]
DRAWS = 1 << 20
"""Node number of the draws of documents; those of queries use the block's own."""


@dataclass(frozen=True)
class Examples:
    """Training queries with their positives among the known documents.

    known (m_k,) documents that may be used; positives: for each query its relevant ones; pairs (p,) the same as ascending numbers
    query * m_k + column among the known: a mask (n, m_k) would take a byte for each of millions of pairs.
    """

    known: I64
    positives: tuple[I64, ...]
    pairs: I64
    itself: I64

    @classmethod
    def of(cls, data: Retrieval) -> Examples:
        """The training queries of a data set; each must have a relevant document that is not withheld."""
        known = np.asarray(data.known, dtype=np.int64)
        allowed = np.isin(np.arange(len(data.documents)), known)
        positives = tuple(np.array([d for d in row if allowed[d]], dtype=np.int64) for row in data.train.relevant)
        for place, row in enumerate(positives):
            if not len(row):
                raise ValueError(
                    f"data: training query {data.train.ids[place]} has no relevant document that is not withheld"
                )
        pairs = [place * len(known) + np.searchsorted(known, row) for place, row in enumerate(positives)]
        return cls(known, positives, np.unique(np.concatenate([np.empty(0, np.int64), *pairs])), data.train.itself)

    def __len__(self) -> int:
        return len(self.positives)

    def spread(self, count: int) -> I64:
        """At most `count` query rows, evenly over all: published data lie sorted by class."""
        return spread(len(self), count)

    def queries(self, seeds: Seeds, step: int, block: int, count: int) -> I64:
        """(count,) query rows of a block, drawn with replacement."""
        return seeds.integers(Stream.BATCH, block, step, count, len(self))[0]

    def relevant(self, rows: I64, columns: I64) -> NDArray[np.bool_]:
        """(b, K) whether these known documents (b, K), by their columns, are right for the queries (b,)."""
        asked = rows[:, None] * len(self.known) + columns
        found = np.minimum(np.searchsorted(self.pairs, asked), len(self.pairs) - 1)
        return self.pairs[found] == asked

    def groups(
        self, seeds: Seeds, step: int, block: int, rows: I64, others: int, own: I64 | None = None
    ) -> tuple[I64, NDArray[np.bool_]]:
        """Documents (b, 1 + others) for these queries, a positive first; and which of the others are positives, too.

        The others are random known ones without repetition; with `own` (n, top), half of them are drawn from the query's row
        of it.
        """
        b, m = len(rows), len(self.known)
        u = seeds.uniform(Stream.BATCH, DRAWS + block, step, b * (1 + m)).reshape(b, 1 + m)
        first = np.array(
            [self.positives[q][int(x * len(self.positives[q]))] for q, x in zip(rows, u[:, 0], strict=True)]
        )
        priority = u[:, 1:].copy()
        if own is not None:
            half = others // 2
            chosen = np.take_along_axis(own[rows], np.argsort(priority[:, : own.shape[1]], 1), 1)[:, :half]
            np.put_along_axis(priority, chosen, -1.0, 1)
        columns = np.searchsorted(self.known, first)
        np.put_along_axis(priority, columns[:, None], 2.0, 1)  # not twice
        if (itself := self.itself[rows]).max(initial=-1) >= 0:
            inside = np.isin(itself, self.known)
            priority[inside, np.searchsorted(self.known, itself[inside])] = (
                1.5  # a query's own text is no document for it
            )
        # all other documents are one fewer where some query is a document itself: the same number for every query
        count = min(others, m - 1 - int(np.isin(self.itself, self.known).any()))
        picked = (
            np.argpartition(priority, count - 1, 1)[:, :count] if 0 < count < m else np.argsort(priority, 1)[:, :count]
        )
        picked.sort(1)
        documents = np.concatenate([first[:, None], self.known[picked]], 1)
        also = self.relevant(rows, picked)
        return documents, np.concatenate([np.zeros((b, 1), bool), also], 1)


def spread(n: int, count: int) -> I64:
    """At most `count` of n rows, evenly over all."""
    return np.arange(min(n, count), dtype=np.int64) * n // max(1, min(n, count))
