"""The top layers of a body, trained, on states of the frozen layers below that are computed once per text.

Shapes: b texts of a batch, L tokens of the longest, L_i tokens of text i, d hidden size.

Notable choices
- Below the lowest trained layer nothing ever changes, so its input is kept per text (`lower`): a training step runs the top
  layers only. That is exact. Embeddings are never trained.
- The model's own forward pass is used, as in raysys.nn.body: masks, positions and final norms stay the library's business.
- Evaluation mode throughout: no dropout, so that the seed alone decides what comes out.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from raysys.nn.body import _Passed, _Reached
from raysys.nn.encoder import TextEncoder
from raysys.nn.lora import layer_stack
from raysys.nn.pretrained import Base


class Upper(nn.Module):
    """Trainable copies of the top `layers` layers of a body; the layers below are the base's own and stay as they are.

    Raises:
        ValueError: the model has not that many layers, or takes fewer tokens than max_length.
    """

    def __init__(self, base: Base, layers: int, max_length: int = 128) -> None:
        super().__init__()
        name = layer_stack(base.model)
        total = len(base.model.get_submodule(name))  # type: ignore[arg-type]
        if not 1 <= layers <= total:
            raise ValueError(f"layers: got {layers}; this model has {total}, of which 1 to {total} may be trained")
        self.lowest = total - layers
        self.tokens = TextEncoder(base, max_length)
        self._base = (base.model,)  # not as a part of this module
        self._entry = base.model.get_submodule(f"{name}.{self.lowest}")
        kept = [one for part, one in base.model.named_parameters() if not _trained(part, name, self.lowest)]
        self.model = copy.deepcopy(base.model, {id(one): one for one in kept})
        stack: Any = self.model.get_submodule(name)
        for i in range(self.lowest):
            stack[i] = _Passed(stack[i])
        for i in range(self.lowest, total):
            stack[i].requires_grad_(True)
        stack[self.lowest].register_forward_pre_hook(self._enter, with_kwargs=True)
        self.causal, self.width = base.causal, base.width
        self._embedding = int(base.model.get_input_embeddings().weight.shape[1])  # type: ignore[operator]
        self._hidden: Tensor | None = None

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return ((self._hidden, *args[1:]), kwargs) if args else ((), kwargs | {"hidden_states": self._hidden})

    @torch.no_grad()
    def lower(self, texts: Sequence[str], second: Sequence[str] | None = None) -> list[Tensor]:
        """Each text's (or pair's) input (L_i, d) to the lowest trained layer."""
        out = [torch.empty(0)] * len(texts)
        for rows, batch in self.tokens.padded(texts, second):
            hidden = self._reach(batch)
            for i, row, length in zip(rows.tolist(), hidden, batch["attention_mask"].sum(1).tolist(), strict=True):
                out[i] = row[:length].clone()
        return out

    def _reach(self, batch: dict[str, Tensor]) -> Tensor:
        found: list[Tensor] = []

        def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(args[0] if args else kwargs["hidden_states"])
            raise _Reached

        handle = self._entry.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self._base[0](**batch)
        except _Reached:
            return found[0]
        finally:
            handle.remove()
        raise RuntimeError(f"{type(self._base[0]).__name__} did not call its layer {self.lowest}")

    def forward(self, states: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Last hidden states (b, L, d) and mask (b, L) of texts, from what `lower` gave. Differentiable in the top layers."""
        length = torch.tensor([len(one) for one in states])
        hidden = nn.utils.rnn.pad_sequence(list(states), batch_first=True)
        mask = (torch.arange(hidden.shape[1]) < length[:, None]).long().to(hidden.device)
        self._hidden = hidden
        # What goes in at the bottom is never looked at, but for its shape; an embedding may be narrower than d.
        unseen = hidden.new_zeros(1).expand(*hidden.shape[:2], self._embedding)
        try:
            return self.model(inputs_embeds=unseen, attention_mask=mask).last_hidden_state, mask
        finally:
            self._hidden = None


def _trained(parameter: str, stack: str, lowest: int) -> bool:
    """Whether a parameter, by its name, belongs to a trained layer."""
    inside = parameter.removeprefix(f"{stack}.") if parameter.startswith(f"{stack}.") else ""
    return bool(inside) and int(inside.split(".")[0]) >= lowest
