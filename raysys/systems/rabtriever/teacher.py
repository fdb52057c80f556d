"""The teacher: a generative reranker that reads document and query together and answers T or F (LaHoRe, arXiv 2412.16615).

Shapes: n prompts, d hidden size, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raysys.systems.rabtriever.backbone import Backbone, Part, Prefix

I64 = NDArray[np.int64]
FEWEST = 16
"""Rows of a batch at least; matrix products of fewer rows go through other kernels and differ in the last bit."""
Score = Literal["log_odds", "paper_eq9"]


def log_odds(logits: Tensor, labels: tuple[int, int]) -> Tensor:
    """l_T - l_F (n,) of logits (n, V): the logit of P(T) / (P(T) + P(F)). Larger is more relevant."""
    return logits[..., labels[0]] - logits[..., labels[1]]


def paper_eq9(logits: Tensor, labels: tuple[int, int]) -> Tensor:
    """The paper's Eq. 9 to the letter: log P(T) / (log P(T) + log P(F)), softmax over all of V [P].

    Its orientation is wrong: both logarithms are negative, so the ratio *falls* as P(T) grows (.044 at P(T) = .9, .956
    at P(T) = .1), and sorting by it puts the best document last. Kept to be measured; everything else uses `log_odds`.
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
        return self._map(part, lambda one: self.backbone.read(one).last, self.backbone.window)

    @torch.inference_mode()
    def queries(self, part: Part) -> Tensor:
        """e_Q: answer states (n, d) of queries that see no document, float32."""
        return self._map(part, self.backbone.answer)

    def _map(self, part: Part, read: Callable[[Part], Tensor], most: int | None = None) -> Tensor:
        out = torch.empty(len(part.length), self.backbone.width)
        for place, rows, (width,) in like_lengths([(part, np.arange(len(out)))], [most], self.batch):
            out[place] = read(self._here(part.pick(rows, width)))[: len(place)].float().cpu()
        return out

    def _here(self, part: Part) -> Part:
        return Part(part.units.to(self.backbone.device), part.length.to(self.backbone.device))

    @torch.inference_mode()
    def keep(self, documents: Part) -> Prefix:
        """Read documents once and keep their keys and values, in the whole window: for small pools, or those at hand."""
        whole = documents.pick(torch.arange(len(documents.length)), self.backbone.window)
        parts = [
            self.backbone.read(self._here(whole.pick(rows)), keep=True) for rows in _at_least(whole.length, self.batch)
        ]
        n = len(whole.length)
        keys, values = (
            [torch.cat([p.layers[number][side] for p in parts])[:n] for number in range(len(parts[0].layers))]
            for side in (0, 1)
        )
        layers = list(zip(keys, values, strict=True))
        return Prefix(layers, torch.cat([p.mask for p in parts])[:n], torch.cat([p.states for p in parts])[:n])

    @torch.inference_mode()
    def states(self, documents: Part, queries: Part, pairs: I64, prefix: Prefix | None = None) -> Tensor:
        """Answer states (P, d), float32, of pairs (P, 2) of (query, document) rows.

        With `prefix` (all `documents`, kept) only the queries are read; the states are the same up to rounding. Either way a
        pair's state has the same bits whatever other pairs are asked for with it.
        """
        out = torch.empty(len(pairs), self.backbone.width)
        lengths: list[tuple[Part, I64]] = [(queries, pairs[:, 0])]
        most: list[int | None] = [None]
        if prefix is None:
            lengths.append((documents, pairs[:, 1]))
            most.append(self.backbone.window)
        for place, rows, widths in like_lengths(lengths, most, self.batch):
            chosen = torch.from_numpy(pairs)[rows]
            q = self._here(queries.pick(chosen[:, 0], widths[0]))
            if prefix is not None:
                found = self.backbone.answer(q, prefix.pick(chosen[:, 1].to(self.backbone.device)))
            else:
                found = self.backbone.pairs(self._here(documents.pick(chosen[:, 1], widths[1])), q)
            out[place] = found[: len(place)].float().cpu()
        return out

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
        rows = max(1, 65_536 // m)  # queries of a slab: only its states are in memory
        parts = []
        for start in range(0, n, rows):
            chosen = np.arange(start, min(n, start + rows))
            pairs = np.stack([np.repeat(chosen, m), np.tile(np.arange(m), len(chosen))], 1)
            parts.append(self.scores(self.states(documents, queries, pairs, prefix), how))
        return torch.cat(parts).view(n, m).numpy()


def like_lengths(
    parts: Sequence[tuple[Part, I64]], most: Sequence[int | None], batch: int
) -> Iterator[tuple[Tensor, Tensor, tuple[int, ...]]]:
    """Batches of rows whose units are padded alike: (where they stand, rows to read, widths of the parts).

    A width depends on a row's own length only, and a batch has at least FEWEST rows (the last one repeated): then every matrix
    product of a row runs through the same kernel whatever shares its batch, and its result has the same bits.

    Args:
        parts: for each part, its texts and the (n,) rows of them. most: largest width of each part, or None.
    """
    columns = []
    for (part, rows), limit in zip(parts, most, strict=True):
        lengths = part.length[torch.from_numpy(rows)].tolist()
        columns.append([min(bucket(n), limit) if limit else bucket(n) for n in lengths])
    keys = np.stack(columns, 1)
    widths, group = np.unique(keys, axis=0, return_inverse=True)
    for number, width in enumerate(widths):
        place = torch.from_numpy(np.flatnonzero(group.reshape(-1) == number))
        for chosen in _at_least(place, batch):
            yield place[chosen[0] : chosen[-1] + 1], place[chosen], tuple(int(one) for one in width)


def _at_least(values: Tensor, batch: int) -> list[Tensor]:
    """Positions 0 .. n - 1 in batches; the last position is repeated where there are fewer than FEWEST."""
    n = len(values)
    return [torch.arange(i, max(min(i + batch, n), i + FEWEST)).clamp_max(n - 1) for i in range(0, n, batch)]


def bucket(length: int) -> int:
    """Units that a text is padded to: 1, 2, 4, 8, then multiples of 16."""
    return 1 << (length - 1).bit_length() if length <= 8 else -(-length // 16) * 16


def digest(backbone: Backbone) -> str:
    """SHA-256 of all weights by name: what was frozen must have the same before and after."""
    told = hashlib.sha256()
    for name, tensor in sorted(backbone.state_dict().items()):
        told.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        told.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return told.hexdigest()
