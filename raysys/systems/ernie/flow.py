"""Rows under way: feed a group, read what it predicts, choose, feed the next. For one model and its cache.

Shapes: R rows, n tokens of a group, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from raysys.systems.ernie.batch import Batch, Plan, Planner, pack
from raysys.systems.ernie.elastic import Elastic, SubModel
from raysys.systems.ernie.model import Choose, Outputs, UniModel
from raysys.systems.ernie.stream import I64, MODALITY, NONE, Kind, Sample, Special, lay


def no_vision(latents: Tensor) -> Plan:
    """Planner of batches that hold no image to be predicted."""
    raise ValueError("this batch holds an image to be predicted; expected a planner")


class Flow:
    """Prompts that have been laid out and are ready to be read; all rows use the same sub-model.

    Args:
        opened: the special token after each prompt, which says what is to come; None goes on with the prompt itself.
        room: places that will be fed after the prompts.
        planner: quantises images of the prompts; needed only if there are some.
        begun: text (n,) of each row that follows `opened` and is given: the beginning of an answer that is to go on.
    """

    def __init__(
        self,
        model: UniModel,
        prompts: Sequence[Sample],
        opened: Special | None,
        room: int,
        sub: SubModel | None = None,
        planner: Planner = no_vision,
        begun: Sequence[I64] | None = None,
    ) -> None:
        self.model, s = model, model.sizes
        self.device = model.embed_text.weight.device
        laid = [lay(prompt, s.scales, opened) for prompt in prompts]
        for one, ids in zip(laid, begun or (), strict=begun is not None):
            for id in ids:
                one.word(int(id))
        self.prompt = pack(laid, None, planner, s.bits, s.levels, s.codes).to(str(self.device))
        self.rows, width = self.prompt.ids.shape
        ends = torch.tensor([len(one) - 1 for one in laid], device=self.device)
        self.last = torch.arange(self.rows, device=self.device) * width + ends
        """Flat places (R,) of the last tokens of what is fed next: first the prompts, then a group."""
        self.at = torch.tensor([one.at for one in laid], dtype=torch.float32, device=self.device)
        self._empty = torch.zeros(0, dtype=torch.int64, device=self.device)
        self.group = torch.tensor([one.group[-1] for one in laid], device=self.device)
        self.elastic = None if sub is None else sub.rows(self.rows, model.setting, str(self.device))
        self.cache = model.cache(self.rows, width + room)

    def start(self, choose: Choose | None = None, **asked: Tensor) -> Outputs:
        """Read the prompts; `asked` are the fields of the batch that say what is to be predicted."""
        blank = torch.full_like(self.prompt.next, NONE)
        fields: dict[str, Any] = {"next": blank, **asked}
        return self._run(replace(self.prompt, **fields), choose)

    def text(self, ids: Tensor) -> Outputs:
        """Feed a text token (R,) to each row, and ask for the next one."""
        batch = self._group(Kind.TEXT, self._running(), ids=ids[:, None])
        return self._run(replace(batch, next=torch.zeros_like(batch.next)))

    def codes(self, codes: Tensor, choose: Choose) -> Outputs:
        """Feed an audio frame (R, Q) to each row, and choose the next one."""
        batch = self._group(Kind.AUDIO, self._running(), codes=codes)
        everywhere = torch.arange(self.rows, device=self.device)
        unknown = codes.new_full((self.rows, codes.shape[1]), NONE)
        return self._run(replace(batch, audio_at=everywhere, code_at=everywhere, code=unknown), choose)

    def visual(self, features: Tensor, places: Tensor, scale: int, predicting: bool) -> Outputs:
        """Feed a group of visual tokens (R, n, d) at `places` (n, 3) relative to the running index. Bits are predicted by every
        token, or, where the group is the sum of a frame (not `predicting`), by its last one: the next frame's first scale."""
        n = features.shape[1]
        batch = self._group(Kind.VISUAL, places[None] + self.at[:, None, None])
        flat = torch.arange(self.rows * n, device=self.device)
        asked = flat if predicting else flat.view(self.rows, n)[:, -1]
        return self._run(
            replace(
                batch, visual=features.flatten(0, 1), visual_at=flat, scale=torch.full_like(flat, scale), bit_at=asked,
            )
        )  # fmt: skip

    def pick(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        self.rows, self.at, self.group = len(rows), self.at[rows], self.group[rows]
        self.cache.pick(rows)
        if self.elastic is not None:
            keep, active, allowed = self.elastic.keep, self.elastic.active, self.elastic.allowed
            self.elastic = Elastic(keep[rows], active[rows], None if allowed is None else allowed[:, rows])

    def _running(self) -> Tensor:
        """(R, 1, 3): the running index, which moves on."""
        position = self.at[:, None, None].expand(-1, 1, 3)
        self.at = self.at + 1
        return position

    def _group(self, kind: Kind, position: Tensor, **fields: Tensor) -> Batch:
        """A batch of one new group for every row, which predicts nothing yet."""
        self.group = self.group + 1
        shape, s = (self.rows, position.shape[1]), self.model.sizes
        zero = torch.zeros(shape, dtype=torch.int64, device=self.device)
        empty, blank = self._empty, torch.full_like(zero, NONE)
        codes, bits = empty.view(0, s.levels), empty.view(0, s.bits)
        none: dict[str, Any] = {
            "kind": zero + int(kind), "ids": zero, "doc": zero, "group": self.group[:, None].expand(shape),
            "position": position, "task": zero, "modality": zero + MODALITY[kind], "next": blank, "further": blank,
            "visual": bits.to(position.dtype), "visual_at": empty, "scale": empty, "seen": (), "codes": codes,
            "audio_at": empty, "bit_at": empty, "bits": bits, "bit_scale": empty, "code_at": empty, "code": codes,
        }  # fmt: skip
        return Batch(**{**none, **fields})

    def _run(self, batch: Batch, choose: Choose | None = None) -> Outputs:
        found: Outputs = self.model(batch, self.elastic, cache=self.cache, choose=choose)
        return found
