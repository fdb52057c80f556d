"""The teacher's answers for the pairs that a student asks about: in this process, each pair read once.

Shapes: P pairs (query row, document row), d hidden size.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from raysys.systems.rabtriever.backbone import Part
from raysys.systems.rabtriever.teacher import I64, Reranker

MOST = 64_000_000
"""Numbers that are kept at most (256 MB in float32); beyond that, pairs are read again when they are asked for again."""


class Targets(Protocol):
    """A source of the teacher's answer states. Asking and taking are apart so that a remote source can work meanwhile."""

    def ask(self, pairs: I64) -> Any:
        """Start on pairs (P, 2); returns what `take` wants."""

    def take(self, asked: Any) -> Tensor:
        """Answer states (P, d), float32, in the order asked."""


class Kept:
    """Rows by pair: what was computed once is not computed again, until MOST numbers are held."""

    def __init__(self, queries: int, documents: int, width: int) -> None:
        self.documents = documents
        self.room = MOST // width
        self.place = np.full(queries * documents, -1, dtype=np.int32) if queries * documents <= MOST else None
        self.rows = torch.empty(0, width)
        self.count = 0

    def missing(self, pairs: I64) -> I64:
        """The pairs, each once, that are not held."""
        keys = np.unique(pairs[:, 0] * self.documents + pairs[:, 1])
        if self.place is not None:
            keys = keys[self.place[keys] < 0]
        return np.stack([keys // self.documents, keys % self.documents], 1)

    def add(self, pairs: I64, states: Tensor) -> None:
        """Hold these rows, as far as there is room."""
        if self.place is None or self.count + len(pairs) > self.room:
            return
        if self.count + len(pairs) > len(self.rows):
            grown = torch.empty(min(self.room, max(2 * len(self.rows), self.count + len(pairs))), states.shape[1])
            grown[: self.count] = self.rows[: self.count]
            self.rows = grown
        self.rows[self.count : self.count + len(pairs)] = states
        self.place[pairs[:, 0] * self.documents + pairs[:, 1]] = np.arange(self.count, self.count + len(pairs))
        self.count += len(pairs)

    def gather(self, pairs: I64, missing: I64, fresh: Tensor) -> Tensor:
        """States (P, d) of pairs, some held and the `missing` ones just computed."""
        keys, made = pairs[:, 0] * self.documents + pairs[:, 1], missing[:, 0] * self.documents + missing[:, 1]
        out = torch.empty(len(pairs), fresh.shape[1])
        new = np.isin(keys, made)
        if new.any():
            out[torch.from_numpy(new)] = fresh[torch.from_numpy(np.searchsorted(made, keys[new]))]
        if not new.all():
            assert self.place is not None
            out[torch.from_numpy(~new)] = self.rows[torch.from_numpy(self.place[keys[~new]].astype(np.int64))]
        return out


class LocalTargets:
    """A teacher in this process.

    Args:
        mine: rows of the documents that it will be asked about; all of them unless given. Their keys and values are kept as
            far as MOST_KEPT bytes allow; documents beyond that are read again with each query.
    """

    MOST_KEPT = 1 << 30

    def __init__(self, reranker: Reranker, documents: Part, queries: Part, mine: I64 | None = None) -> None:
        self.reranker, self.documents, self.queries = reranker, documents, queries
        mine = np.arange(len(documents.length)) if mine is None else mine
        one = reranker.keep(documents.pick(torch.from_numpy(mine[:1])))
        cost = sum(k.nbytes + v.nbytes for k, v in one.layers) // max(1, int(documents.length[mine[0]]))
        affordable = np.cumsum(documents.length.numpy()[mine].max() * np.full(len(mine), cost)) <= self.MOST_KEPT
        held = mine[affordable]
        self.slot = np.full(len(documents.length), -1, dtype=np.int64)
        self.slot[held] = np.arange(len(held))
        self.prefix = reranker.keep(documents.pick(torch.from_numpy(held))) if len(held) else None
        self.kept = Kept(len(queries.length), len(documents.length), reranker.backbone.width)
        self.read = 0

    def ask(self, pairs: I64) -> I64:
        return pairs

    def take(self, asked: I64) -> Tensor:
        missing = self.kept.missing(asked)
        fresh = self._states(missing)
        self.read += len(missing)
        out = self.kept.gather(asked, missing, fresh)
        self.kept.add(missing, fresh)
        return out

    def _states(self, pairs: I64) -> Tensor:
        slot = self.slot[pairs[:, 1]]
        out = torch.empty(len(pairs), self.reranker.backbone.width)
        for rows, prefix in ((np.flatnonzero(slot >= 0), self.prefix), (np.flatnonzero(slot < 0), None)):
            if len(rows):
                chosen = pairs[rows] if prefix is None else np.stack([pairs[rows, 0], slot[rows]], 1)
                out[torch.from_numpy(rows)] = self.reranker.states(self.documents, self.queries, chosen, prefix)
        return out
