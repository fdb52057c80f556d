"""Experts for a few tokens when nothing is to be differentiated: what decoding asks for at every step.

Notable choices
- Only the experts that were chosen are touched, by number: sorting, counting and one view per expert of all E cost more than the
  products of a handful of rows. One token of 4 experts of 64 (width 96, inner 32): 49 us instead of 309.
- A single token needs no gathering and no scattering: its outputs are added up by the products themselves.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MOST = 64
"""Assignments; with more, `raysys.nn.experts.mixture` sorts."""


def applies(x: Tensor, w_in: Tensor, chosen: Tensor) -> bool:
    """Whether `mixture` may be asked: few rows in float32 or float64 on a CPU, without gradients and autocast."""
    return (
        chosen.numel() <= MOST
        and not torch.is_grad_enabled()
        and x.device.type == "cpu"
        and x.dtype == w_in.dtype
        and x.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled("cpu")
    )


def mixture(x: Tensor, w_in: Tensor, w_out: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
    """As `raysys.nn.experts.mixture`: x (N, D), w_in (E, D, 2F), w_out (E, F, D), chosen and gates (N, k): (N, D)."""
    gates = gates.to(x.dtype)
    if len(x) == 1:
        return _one(x, w_in, w_out, chosen[0].tolist(), gates[0])
    k = chosen.shape[1]
    places: dict[int, list[int]] = {}
    for place, expert in enumerate(chosen.reshape(-1).tolist()):
        if expert >= 0:
            places.setdefault(expert, []).append(place)
    if not places:
        return torch.zeros_like(x)
    order = torch.tensor([place for mine in places.values() for place in mine], dtype=torch.int64)
    rows, sizes = order // max(1, k), [len(mine) for mine in places.values()]
    given = x.index_select(0, rows)
    inner = x.new_empty(len(order), w_in.shape[2])
    for expert, own, out in zip(places, torch.split(given, sizes), torch.split(inner, sizes), strict=True):
        torch.mm(own, w_in[expert], out=out)
    gate, up = inner.chunk(2, dim=1)
    act = F.silu(gate) * up * gates.reshape(-1).index_select(0, order)[:, None]
    for expert, own, out in zip(places, torch.split(act, sizes), torch.split(given, sizes), strict=True):
        torch.mm(own, w_out[expert], out=out)
    return torch.zeros_like(x).index_add_(0, rows, given)


def _one(x: Tensor, w_in: Tensor, w_out: Tensor, chosen: list[int], gates: Tensor) -> Tensor:
    """One token (1, D) of the experts `chosen`, -1 where unused."""
    experts = [expert for expert in chosen if expert >= 0]
    if not experts:
        return torch.zeros_like(x)
    if len(experts) < len(chosen):
        last = chosen[len(experts) :]  # usually it is the last ones that are unused, and a slice is cheap
        gates = gates[: len(experts)] if max(last) < 0 else gates[[j for j, expert in enumerate(chosen) if expert >= 0]]
    gate, up = torch.cat([torch.mm(x, w_in[expert]) for expert in experts]).chunk(2, dim=1)
    parts = torch.split(F.silu(gate) * up * gates[:, None], 1)
    y = torch.mm(parts[0], w_out[experts[0]])
    for expert, part in zip(experts[1:], parts[1:], strict=True):
        y = torch.addmm(y, part, w_out[expert])
    return y
