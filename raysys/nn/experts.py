"""SwiGLU experts on the rows routed to them: sort by expert, one product per expert, add up per token. No token is dropped.

Shapes: N tokens of D numbers, k assignments of each, E experts of inner width F; M <= N k assignments that are used.

Notable choices
- An unused assignment (expert -1) is left out before anything is computed, so a smaller k costs less.
- Parameters are never indexed by expert inside a loop: the backward of `w[e]` makes a zero tensor of all E experts for each
  of them, E^2 work. `unbind` has one stack in its backward, `grouped_mm` nothing of the kind.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Dispatch(NamedTuple):
    """Which assignments are computed, in the order of their experts (and of tokens within one)."""

    order: Tensor
    """(M,) places of the used assignments in the flattened (N, k) choice."""
    rows: Tensor
    """(M,) the token of each."""
    counts: Tensor
    """(E,) assignments of each expert."""


def dispatch(chosen: Tensor, experts: int) -> Dispatch:
    """Sort assignments (N, k), -1 where unused, by expert; stable, so that a token's batch does not reorder its sums."""
    flat = chosen.reshape(-1)
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat + 1, minlength=experts + 1)
    order = order[int(counts[0]) :]
    return Dispatch(order, order // max(1, chosen.shape[1]), counts[1:])


def mixture(x: Tensor, w_in: Tensor, w_out: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
    """y_n = sum_j gates[n, j] Expert_chosen[n, j](x_n), with Expert_e(x) = (silu(x W_gate) * (x W_up)) W_out.

    Args:
        x: (N, D).
        w_in: (E, D, 2F), gate and up side by side.
        w_out: (E, F, D).
        chosen: (N, k) int64 experts, -1 where unused.
        gates: (N, k).

    Returns:
        (N, D) in x's dtype.
    """
    plan = dispatch(chosen, len(w_in))
    out = run(x[plan.rows], w_in, w_out, plan.counts)
    weighted = out * gates.reshape(-1)[plan.order, None]
    return x.new_zeros(x.shape, dtype=weighted.dtype).index_add(0, plan.rows, weighted).to(x.dtype)


def run(x: Tensor, w_in: Tensor, w_out: Tensor, counts: Tensor) -> Tensor:
    """Experts on rows (M, D) that are sorted by expert, counts (E,) of each: (M, D)."""
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, w_in, w_out = x.to(dtype), w_in.to(dtype), w_out.to(dtype)
    parts = torch.split(x, counts.tolist())
    outs = list[Tensor]()
    for rows, inner, outer in zip(parts, w_in.unbind(), w_out.unbind(), strict=True):
        gate, up = (rows @ inner).chunk(2, dim=-1)
        outs.append((F.silu(gate) * up) @ outer)
    return torch.cat(outs)
