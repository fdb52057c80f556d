"""Texts on their way into the lowest adapted layer, computed when first asked for and kept.

Notable choices
- Texts are run in fixed groups of similar length, whichever of them are asked for: the last bits of a matrix product depend on
  the shape of the batch, and which process asks for which texts must not change a result.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from raysys.nn.body import Encoded, TextBody

GROUP = 64


class TextStore:
    """The states of texts (or pairs of texts) below the adapted layers: memory for what was asked for, d floats a token."""

    def __init__(self, body: TextBody, first: Sequence[str], second: Sequence[str] | None = None) -> None:
        self.body, self.first, self.second = body, first, second
        length = [len(text) + (len(second[i]) if second else 0) for i, text in enumerate(first)]
        self.order = np.argsort(np.array(length), kind="stable")
        self.group = np.empty(len(first), np.int64)
        self.group[self.order] = np.arange(len(first)) // GROUP
        missing = torch.full((len(first),), -1, device=body.device)
        self.encoded = Encoded(missing, missing.clone(), torch.empty(0, body.base.width, device=body.device))

    def of(self, rows: NDArray[np.int64]) -> Encoded:
        """The store, holding at least these texts; others have start -1."""
        flat = np.unique(rows)
        absent = flat[(self.encoded.start[torch.from_numpy(flat).to(self.encoded.start.device)] < 0).cpu().numpy()]
        if len(absent):
            self._add(np.unique(self.group[absent]))
        return self.encoded

    def _add(self, groups: NDArray[np.int64]) -> None:
        start, length = self.encoded.start.clone(), self.encoded.length.clone()
        pieces, total = [self.encoded.hidden], len(self.encoded.hidden)
        for group in groups:
            texts = self.order[group * GROUP : (group + 1) * GROUP]
            second = None if self.second is None else [self.second[i] for i in texts]
            for i, states in zip(texts, self.body.lower_states([self.first[i] for i in texts], second), strict=True):
                start[i], length[i] = total, len(states)
                total += len(states)
                pieces.append(states)
        self.encoded = Encoded(start, length, torch.cat(pieces))
