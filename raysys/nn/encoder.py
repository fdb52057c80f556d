"""Texts to vectors by a frozen body, in batches of like length.

Shapes: n texts, b texts of a batch, L tokens of its longest, L_i tokens of text i, d hidden size.

Notable choices
- All texts are cut into tokens first and sorted by their number of tokens, not of characters; where to cut them into batches of
  at most `batch_tokens` is found by dynamic programming. One long text among 15 short ones does not pad them: half the time.
- Rows come back in the order asked for. A text's vector depends on its batch in the last bits of float32 only (1e-5).
- bf16 runs a copy of the body with bfloat16 weights; the base itself, which others share, stays as it is. What comes out is
  float32 either way.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raysys.nn.body import most_tokens, pool
from raysys.nn.pretrained import Base

CPU_TOKENS, GPU_TOKENS = 1024, 16384
"""On a CPU what a batch goes through should stay in its caches: 4096 tokens of mixed lengths took a fifth longer."""
PASS_TOKENS = {"cpu": 64, "cuda": 8192}
"""What a forward pass costs besides its tokens, in tokens: measured on a CPU; a GPU would rather pad than start again."""


class TextEncoder:
    """Texts to vectors by a frozen body, in batches of like length.

    Args:
        base: the body and its tokenizer; used where it lies, never changed.
        max_length: tokens kept of a text, its end is cut off.
        bf16: compute with bfloat16 weights.
        batch_tokens: tokens of a batch, padding included; one text may have more. None for what suits the device.

    Raises:
        ValueError: max_length or batch_tokens is below 1, or the model takes fewer tokens than max_length.
    """

    def __init__(self, base: Base, max_length: int = 128, bf16: bool = False, batch_tokens: int | None = None) -> None:
        self.device = next(base.model.parameters()).device
        if batch_tokens is None:
            batch_tokens = CPU_TOKENS if self.device.type == "cpu" else GPU_TOKENS
        for name, value in (("max_length", max_length), ("batch_tokens", batch_tokens)):
            if value < 1:
                raise ValueError(f"{name}: got {value}; it must be at least 1")
        most = most_tokens(base.model)
        if most is not None and max_length > most:
            raise ValueError(f"max_length: got {max_length}; this model takes at most {most} tokens")
        self.base, self.max_length, self.batch_tokens = base, max_length, batch_tokens
        self.model = copy.deepcopy(base.model).to(torch.bfloat16) if bf16 else base.model
        self.width = base.width

    def encode(self, texts: Sequence[str], normalize: bool = True) -> Tensor:
        """(n, d) float32 on the CPU: the mean of a text's last hidden states, of a causal model the last one; L2 norm 1 if asked.

        Raises:
            ValueError: a text is empty.
        """
        out = torch.empty(len(texts), self.width)
        for rows, hidden, mask in self._batches(texts):
            vectors = pool(hidden, mask, self.base.causal).float()
            if normalize:
                vectors = torch.nn.functional.normalize(vectors, dim=1)
            out[rows] = vectors.cpu()
        return out

    def states(self, texts: Sequence[str]) -> list[Tensor]:
        """n tensors (L_i, d) float32 on the CPU: the last hidden states of each text, special tokens included.

        Raises:
            ValueError: a text is empty.
        """
        out = [torch.empty(0)] * len(texts)
        for rows, hidden, mask in self._batches(texts):
            for i, row, length in zip(rows.tolist(), hidden.float().cpu(), mask.sum(1).tolist(), strict=True):
                out[i] = row[:length].clone()
        return out

    def _batches(self, texts: Sequence[str]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Batches: which texts (b,), their last hidden states (b, L, d), their masks (b, L)."""
        for rows, batch in self.padded(texts):
            with torch.inference_mode():
                hidden = self.model(**batch).last_hidden_state
            yield rows, hidden, batch["attention_mask"]  # outside of the mode, which would reach into the caller

    def padded(
        self, texts: Sequence[str], second: Sequence[str] | None = None
    ) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Batches of texts, or of pairs of texts, of like length: which ones (b,), and what the model takes, each (b, L).

        Raises:
            ValueError: a text is empty.
        """
        if not len(texts):
            return
        for part in (texts, second or ()):
            for i, text in enumerate(part):
                if not text.strip():
                    raise ValueError(f"texts: got an empty text at position {i}; every text needs a visible character")
        pairs = () if second is None else (list(second),)
        made = self.base.tokenizer(list(texts), *pairs, truncation=True, max_length=self.max_length)
        length = np.array([len(ids) for ids in made["input_ids"]])
        if not length.all():
            raise ValueError(f"texts: got a text without any token at position {int(length.argmin())}")
        fill = {"input_ids": self.base.tokenizer.pad_token_id or 0}
        for rows in self._cut(length):
            longest = int(length[rows].max())
            batch = {}
            for key, values in made.items():
                padded = np.full((len(rows), longest), fill.get(key, 0), np.int64)
                for row, i in zip(padded, rows, strict=True):
                    row[: length[i]] = values[i]
                batch[key] = torch.from_numpy(padded).to(self.device)
            mask = torch.from_numpy(np.arange(longest) < length[rows][:, None]).to(self.device).long()
            batch["attention_mask"] = mask
            yield torch.from_numpy(rows), batch

    def _cut(self, length: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
        """Texts of like length, the longest first."""
        kind = "cpu" if self.device.type == "cpu" else "cuda"
        for rows in reversed(chunks(length.tolist(), PASS_TOKENS[kind], self.batch_tokens)):
            yield np.array(rows)


def chunks(lengths: Sequence[int], pass_tokens: int, most: int | None = None) -> list[list[int]]:
    """Cut a batch into forward passes of texts of like lengths, at the least cost: (n,) lengths to indices, shortest first.

    A pass costs its padded tokens plus `pass_tokens`, and has at most `most` padded tokens, or one text. The cut is the best one,
    by dynamic programming over sorted lengths.
    """
    order = np.argsort(lengths, kind="stable")
    sorted_lengths = np.asarray(lengths)[order].tolist()
    best, start = np.zeros(len(order) + 1, np.int64), [0]
    for end, longest in enumerate(sorted_lengths, start=1):
        first = 0 if most is None else max(0, end - max(1, most // longest))
        cost = best[first:end] + longest * np.arange(end - first, 0, -1)
        cut = int(cost.argmin())
        best[end] = cost[cut] + pass_tokens
        start.append(first + cut)
    parts, end = [], len(order)
    while end:
        parts.append(order[start[end] : end].tolist())
        end = start[end]
    return parts[::-1]
