"""The teacher: a generative reranker that reads document and query together and answers T or F (LaHoRe, arXiv 2412.16615).

Shapes: n prompts, d hidden size, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raysys.systems.rabtriever.backbone import Backbone, Part, Prefix

I64 = NDArray[np.int64]
Score = Literal["log_odds", "paper_eq9"]


def log_odds(logits: Tensor, labels: tuple[int, int]) -> Tensor:
    """l_T - l_F (n,) of logits (n, V): the logit of P(T) / (P(T) + P(F)). Larger is more relevant."""
    return logits[..., labels[0]] - logits[..., labels[1]]


def paper_eq9(logits: Tensor, labels: tuple[int, int]) -> Tensor:
    """The paper's Eq. 9 to the letter: log P(T) / (log P(T) + log P(F)), softmax over all of V [P].

    Its orientation is wrong: both logarithms are negative, so the ratio *falls* as P(T) grows (P(T) = .9 gives .044, P(T) = .1 gives
    .956), and sorting by it puts the best document last. Kept to be measured; every other part of this system uses `log_odds`.
    """
    log_p = logits.float().log_softmax(-1)
    true, false = log_p[..., labels[0]], log_p[..., labels[1]]
    return true / (true + false)


class Reranker:
    """A trained teacher at work: frozen, in evaluation mode, without gradients.

    Args:
        backbone: model with head.
        batch: prompts read at once.
    """

    def __init__(self, backbone: Backbone, batch: int = 1024) -> None:
        self.backbone, self.batch = backbone.eval().requires_grad_(False), batch

    @torch.inference_mode()
    def documents(self, part: Part) -> Tensor:
        """e_D[-1] (n, d), float32."""
        return self._map(part, lambda one: self.backbone.read(one).last)

    @torch.inference_mode()
    def queries(self, part: Part) -> Tensor:
        """e_Q: answer states (n, d) of queries that see no document, float32."""
        return self._map(part, self.backbone.answer)

    def _map(self, part: Part, read) -> Tensor:  # type: ignore[no-untyped-def]
        """Read a part in batches of like length; the order is the given one."""
        order = part.length.argsort(stable=True)
        out = torch.empty(len(order), self.backbone.width)
        for rows in order.split(self.batch):
            out[rows] = read(self._here(part.pick(rows))).float().cpu()
        return out

    def _here(self, part: Part) -> Part:
        return Part(part.units.to(self.backbone.device), part.length.to(self.backbone.device))

    @torch.inference_mode()
    def keep(self, documents: Part) -> Prefix:
        """Read documents once and keep their keys and values: for small pools, or those at hand."""
        return self.backbone.read(self._here(documents), keep=True)

    @torch.inference_mode()
    def states(self, documents: Part, queries: Part, pairs: I64, prefix: Prefix | None = None) -> Tensor:
        """Answer states (P, d), float32, of pairs (P, 2) of (query, document) rows.

        With `prefix` (all `documents`, kept) only the queries are read; the states are the same up to rounding.
        """
        out = torch.empty(len(pairs), self.backbone.width)
        for place, chosen in self._batches(queries, pairs):
            q = self._here(queries.pick(torch.from_numpy(chosen[:, 0])))
            at = torch.from_numpy(chosen[:, 1])
            if prefix is not None:
                found = self.backbone.answer(q, prefix.pick(at.to(self.backbone.device)))
            else:
                found = self.backbone.pairs(self._here(documents.pick(at)), q)
            out[place] = found.float().cpu()
        return out

    def _batches(self, queries: Part, pairs: I64) -> Iterator[tuple[Tensor, I64]]:
        order = queries.length.numpy()[pairs[:, 0]].argsort(kind="stable")
        for start in range(0, len(pairs), self.batch):
            rows = order[start : start + self.batch]
            yield torch.from_numpy(rows), pairs[rows]

    @torch.inference_mode()
    def logits(self, states: Tensor) -> Tensor:
        """(n, V) of answer states (n, d)."""
        return self.backbone.head(states.to(self.backbone.device).to(self.backbone.head.weight.dtype)).float().cpu()

    def scores(self, states: Tensor, how: Score = "log_odds") -> Tensor:
        """Relevance (n,) of answer states (n, d)."""
        if how == "log_odds":  # two rows of the head are enough, in float32
            return states @ self.backbone.direction.cpu()
        return paper_eq9(self.logits(states), self.backbone.labels)

    def matrix(
        self, documents: Part, queries: Part, prefix: Prefix | None = None, how: Score = "log_odds"
    ) -> NDArray[np.float32]:
        """Scores (n, m) of all queries with all documents."""
        n, m = len(queries.length), len(documents.length)
        grid = np.stack(np.meshgrid(np.arange(n), np.arange(m), indexing="ij"), -1).reshape(-1, 2)
        rows = max(1, 65_536 // m) * m  # states of a slab only are in memory
        parts = [
            self.scores(self.states(documents, queries, grid[i : i + rows], prefix), how)
            for i in range(0, len(grid), rows)
        ]
        return torch.cat(parts).view(n, m).numpy()


def digest(backbone: Backbone) -> str:
    """SHA-256 of all weights by name: what was frozen must have the same before and after."""
    told = hashlib.sha256()
    for name, tensor in sorted(backbone.state_dict().items()):
        told.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        told.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return told.hexdigest()
