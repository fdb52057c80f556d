"""Texts through a frozen body, with the LoRA factors of many nodes at once.

Shapes: k nodes, b texts per node, T tokens of all texts, L tokens of the longest text of a batch, d hidden size, C classes.

Notable choices
- Below the lowest adapted layer nothing ever changes, so its input is computed once per text and kept (`Encoded`); a training
  step then runs the adapted top layers only. That is exact, not an approximation.
- The model's own forward pass is used, with the kept states put in at the lowest adapted layer and the layers below it passed
  over: masks, position embeddings and final norms stay the library's business, whatever the kind of model.
- What comes out is one vector per text; a classifier is a matrix on it, which its owner keeps.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raysys.nn.lora import GroupedLora, Layout, layer_stack
from raysys.nn.pretrained import Base

I64 = NDArray[np.int64]
AGREEMENT = 1e-4
"""Of the largest number that comes out: what rounding may make of two ways of computing the same."""


@dataclass(frozen=True)
class Encoded:
    """Texts as they enter the lowest adapted layer: text i is `hidden[start[i] : start[i] + length[i]]`, hidden (T, d)."""

    start: Tensor
    length: Tensor
    hidden: Tensor


class _Reached(Exception):
    """The forward pass got to the layer whose input is wanted."""


class _Passed(nn.Module):
    """Stands in for a layer whose output is not needed, and has what else some models ask of their layers."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "layer", layer)  # not as a part of this module

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden


class TextBody:
    """pool(body(text)), the body's top layers with the factors of k nodes. max_length: tokens kept of a text or pair.

    Raises:
        ValueError: the model takes fewer tokens than that.
    """

    def __init__(self, base: Base, layout: Layout, max_length: int, bf16: bool = False) -> None:
        most = most_tokens(base.model)
        if most is not None and max_length > most:
            raise ValueError(f"max_length: got {max_length}; this model takes at most {most} tokens")
        self.base, self.layout, self.max_length = base, layout, max_length
        self.device = next(base.model.parameters()).device
        self.lower = base.model
        shared = {id(tensor): tensor for tensor in [*base.model.parameters(), *base.model.buffers()]}
        self.model = copy.deepcopy(base.model, shared)  # modules of its own, on the same weights
        self.lora = GroupedLora(self.model, layout, bf16)
        self.embedding = int(base.model.get_input_embeddings().weight.shape[1])  # type: ignore[operator]
        self.stack = layer_stack(base.model)
        self.lowest = layout.lowest(self.stack)
        layers = self.model.get_submodule(self.stack)
        self.whole = [layers[i] for i in range(self.lowest)]  # type: ignore[index]

    def tokens(self, first: Sequence[str], second: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Padded token ids and masks of texts or pairs of texts.

        The second of a pair is on a line of its own where the model continues texts, or where the tokenizer puts nothing
        between the two. The line starts with the second, so that cutting a long first one does not take it away.
        """
        tokenizer = self.base.tokenizer
        between = tokenizer.num_special_tokens_to_add(True) - tokenizer.num_special_tokens_to_add(False)
        start = "\n" if self.base.causal or not between else ""
        made = tokenizer(
            list(first),
            None if second is None else [start + text for text in second],
            truncation=True,
            max_length=self.max_length,
            padding=True,
            return_tensors="pt",
        )
        return {key: value.to(self.device) for key, value in made.items()}

    @torch.no_grad()
    def lower_states(self, first: Sequence[str], second: Sequence[str] | None = None) -> list[Tensor]:
        """Each text's input (tokens, d) to the lowest adapted layer, all run as one batch."""
        made = self.tokens(first, second)
        hidden = self._reach(made)
        return [row[: int(mask.sum())] for row, mask in zip(hidden, made["attention_mask"], strict=True)]

    def _reach(self, made: dict[str, Tensor]) -> Tensor:
        """Input (b, L, d) of the lowest adapted layer."""
        found: list[Tensor] = []

        def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(args[0] if args else kwargs["hidden_states"])
            raise _Reached

        layer = self.lower.get_submodule(f"{self.stack}.{self.lowest}")
        handle = layer.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self.lower(**made)
        except _Reached:
            return found[0]
        finally:
            handle.remove()
        raise RuntimeError(f"{type(self.lower).__name__} did not call its layer {self.lowest}")

    def pooled(
        self, encoded: Encoded, rows: I64, a: Tensor, b: Tensor, shift: Sequence[Tensor] | None = None
    ) -> Tensor:
        """(k, b, d) for texts `rows` (k, b) of the encoded ones, node i with factors a[i], b[i]. Differentiable in a and b."""
        flat = torch.from_numpy(rows.reshape(-1)).to(self.device)
        length = encoded.length[flat]
        position = torch.arange(int(length.max()), device=self.device)
        mask = (position < length[:, None]).long()
        hidden = encoded.hidden[(encoded.start[flat][:, None] + position.minimum(length[:, None] - 1))]
        with self.lora.factors(a, b, shift), self._entered_at(hidden):
            # What goes in at the bottom is never looked at, but for its shape; an embedding may be narrower than d.
            unseen = hidden.new_zeros(1).expand(*hidden.shape[:2], self.embedding)
            out = self.model(inputs_embeds=unseen, attention_mask=mask).last_hidden_state
        return pool(out, mask, self.base.causal).view(*rows.shape, -1)

    def pooled_tokens(self, made: dict[str, Tensor], a: Tensor, b: Tensor) -> Tensor:
        """(N, d) for a batch of new texts: N / k texts for each of the k sets of factors, in order."""
        with self.lora.factors(a, b):
            return pool(self.model(**made).last_hidden_state, made["attention_mask"], self.base.causal)

    @torch.no_grad()
    def check(self) -> None:
        """Look whether this kind of model works here: kept lower states and top layers give what the whole model gives.

        Two texts, zero factors, float32; a text alone and padded beside a longer one must come out alike, too.

        Raises:
            ValueError: they differ, or something fails on the way: one sentence for the user.
        """
        texts = ["a red car", "why is it so late today, and so dark"]
        a = torch.zeros(1, self.layout.size_a, device=self.device)
        b = torch.zeros(1, self.layout.size_b, device=self.device)
        try:
            states = self.lower_states(texts)
            length = torch.tensor([len(one) for one in states], device=self.device)
            kept = self.pooled(Encoded(length.cumsum(0) - length, length, torch.cat(states)), np.array([[0, 1]]), a, b)[
                0
            ]
            whole = torch.cat([self.pooled_tokens(self.tokens([text]), a, b) for text in texts])
            gap = float((kept - whole).abs().max()) / max(1.0, float(whole.abs().max()))
        except Exception as error:  # models are many and fail in many ways
            reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            raise ValueError(
                f"model: got {self.base.name!r}; its kept and whole passes cannot be run ({reason})"
            ) from error
        if not gap <= AGREEMENT:
            raise ValueError(f"model: got {self.base.name!r}; its kept and whole passes differ by {gap:.1g}")

    @contextmanager
    def _entered_at(self, hidden: Tensor) -> Iterator[None]:
        """Within: the lowest adapted layer gets `hidden`, and what is below it is passed over."""

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return ((hidden, *args[1:]), kwargs) if args else ((), kwargs | {"hidden_states": hidden})

        layers: Any = self.model.get_submodule(self.stack)
        handle = layers[self.lowest].register_forward_pre_hook(enter, with_kwargs=True)
        for i in range(self.lowest):
            layers[i] = _Passed(self.whole[i])
        try:
            yield
        finally:
            handle.remove()
            for i, layer in enumerate(self.whole):
                layers[i] = layer


def most_tokens(model: nn.Module) -> int | None:
    """Tokens that a model has positions for, or None if it has any number. RoBERTa's start after the padding token's."""
    config: Any = model.config
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return None
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return positions - module.padding_idx - 1
    return positions


def pool(out: Tensor, mask: Tensor, causal: bool) -> Tensor:
    """(N, d) from the last hidden states (N, L, d): the mean over the text, or its last token where tokens see only the past."""
    if causal:
        return out[torch.arange(len(out), device=out.device), mask.sum(1) - 1]
    weights = mask.to(out.dtype)[..., None]
    return (out * weights).sum(1) / weights.sum(1)


def random_head(classes: int, width: int, generator: torch.Generator, std: float = 0.05) -> Tensor:
    """(C, d) frozen head, N(0, std^2). Frozen, it needs more than the usual 0.02 to be learned against (spec 8)."""
    return torch.randn(classes, width, generator=generator) * std
