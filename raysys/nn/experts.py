"""SwiGLU experts on the tokens routed to them: sort by expert, one product per expert, add up per token; none is dropped.

Shapes: N tokens of D numbers, k assignments of each, E experts of inner width F; M <= N k assignments that are used.

Notable choices
- An unused assignment (expert -1) is left out before anything is computed, so a smaller k costs less.
- Parameters are never indexed by expert in the graph: the backward of `w[e]` makes a zero tensor of all E experts for each
  of them, E^2 work.
- On the CPU the whole layer is one autograd function (`_Loop`) whose intermediate results fit the cache: a few experts at a
  time are gathered, multiplied and added up, and only the (M, 2F) inner products are kept for backward. The gate scales the
  F inner numbers, not the D outer ones, so its gradient needs no outputs. 64 experts of 4096 tokens then take 1.3 to 1.4 times
  their matrix products (docs/benchmarks.md). Elsewhere `torch.nn.functional.grouped_mm` does all experts in one kernel
  where it was found to work (`grouped_works`), else the same loop.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from raysys.nn import few

CHUNK = 512
"""Rows that the loop handles together, unless one expert has more: 512 x (2D + 3F) floats fit a second-level cache."""


class Dispatch(NamedTuple):
    """Which assignments are computed, in the order of their experts (and of tokens within one)."""

    order: Tensor
    """(M,) places of the used assignments in the flattened (N, k) choice."""
    rows: Tensor
    """(M,) the token of each."""
    counts: Tensor
    """(E,) assignments of each expert."""


def dispatch(chosen: Tensor, experts: int) -> Dispatch:
    """Sort assignments (N, k), -1 where unused, by expert; stable, so an expert sees its tokens in their order."""
    flat = chosen.reshape(-1)
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat + 1, minlength=experts + 1)
    order = order[int(counts[0]) :]
    return Dispatch(order, order // max(1, chosen.shape[1]), counts[1:])


def mixture(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    chosen: Tensor,
    gates: Tensor,
    path: Literal["loop", "grouped"] | None = None,
) -> Tensor:
    """y_n = sum_j gates[n, j] Expert_chosen[n, j](x_n), with Expert_e(x) = (silu(x W_gate) * (x W_up)) W_out.

    Args:
        x: (N, D).
        w_in: (E, D, 2F), gate and up side by side.
        w_out: (E, F, D).
        chosen: (N, k) int64 experts, -1 where unused.
        gates: (N, k).
        path: how; the faster one that works by default. Equal up to rounding; both can be differentiated once.

    Returns:
        (N, D) in x's dtype. Products are in autocast's dtype, sums over a token's experts in float32 at least.
    """
    if path is None and few.applies(x, w_in, chosen):
        return few.mixture(x, w_in, w_out, chosen, gates)
    plan = dispatch(chosen, len(w_in))
    kind = x.device.type
    weights = gates.reshape(-1).index_select(0, plan.order)
    inner = x
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        inner, w_in, w_out = x.to(dtype), w_in.to(dtype), w_out.to(dtype)
    weights = weights.to(inner.dtype)
    with torch.autocast(kind, enabled=False):
        if path == "grouped" or (path is None and kind != "cpu" and grouped_works(x.device, inner.dtype)):
            y = _grouped(inner, w_in, w_out, weights, plan)
        else:
            y = _Loop.apply(inner, w_in, w_out, weights, plan.rows, plan.counts)  # type: ignore[no-untyped-call]
    return y.to(x.dtype)


def _grouped(x: Tensor, w_in: Tensor, w_out: Tensor, weights: Tensor, plan: Dispatch) -> Tensor:
    """`mixture` by grouped products, which take no empty input."""
    if not len(plan.rows):
        return torch.zeros_like(x, dtype=_wide(x.dtype)) + 0 * (x.sum() + w_in.sum() + w_out.sum() + weights.sum())
    offsets = plan.counts.cumsum(0).to(torch.int32)
    gate, up = F.grouped_mm(x.index_select(0, plan.rows), w_in, offs=offsets).chunk(2, dim=-1)
    out = F.grouped_mm(F.silu(gate) * up * weights[:, None], w_out, offs=offsets)
    y = torch.zeros(x.shape, dtype=_wide(x.dtype), device=x.device)
    return y.index_add(0, plan.rows, out.to(y.dtype))


@cache
def grouped_works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether grouped_mm, with its gradients, gives what products one by one give on this device and dtype."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(*shape, generator=generator).to(device, dtype) for shape in ((48, 32), (3, 32, 16)))
    both = list[tuple[Tensor, ...]]()
    for grouped in (True, False):
        leaves = [t.clone().requires_grad_() for t in (x, w)]
        try:
            if grouped:
                ends = torch.tensor([16, 16, 48], dtype=torch.int32, device=device)
                y = F.grouped_mm(leaves[0], leaves[1], offs=ends)
            else:
                y = torch.cat([leaves[0][:16] @ leaves[1][0], leaves[0][16:] @ leaves[1][2]])
            both.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
        except (RuntimeError, NotImplementedError):  # that is the answer: this build has no kernel for it
            return False
    near = 1e-2 if dtype in (torch.bfloat16, torch.float16) else 1e-3
    return all(
        torch.allclose(a, b, rtol=near, atol=near * float(b.detach().abs().max())) for a, b in zip(*both, strict=True)
    )


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class _Chunk(NamedTuple):
    """Experts that are handled together: rows low..high of the sorted ones, each with as many of them as `sizes` says."""

    low: int
    high: int
    experts: list[int]
    sizes: list[int]


def _chunks(counts: list[int]) -> list[_Chunk]:
    """Experts with rows, in order, in chunks of at most CHUNK rows or one expert."""
    found, experts, sizes, low, at = list[_Chunk](), list[int](), list[int](), 0, 0
    for expert, count in enumerate(counts):
        if experts and at + count - low > CHUNK:
            found.append(_Chunk(low, at, experts, sizes))
            experts, sizes, low = [], [], at
        if count:
            experts.append(expert)
            sizes.append(count)
            at += count
    return [*found, _Chunk(low, at, experts, sizes)] if experts else found


class _Space:
    """Memory that is used again by every chunk, and so stays in the cache."""

    def __init__(self, like: Tensor, chunks: list[_Chunk]) -> None:
        self._like, self._rows = like, max((chunk.high - chunk.low for chunk in chunks), default=0)
        self._held = dict[int, Tensor]()

    def __call__(self, number: int, rows: int, columns: int) -> Tensor:
        """The first `rows` of the `number`-th array."""
        if number not in self._held:
            self._held[number] = self._like.new_empty(self._rows, columns)
        return self._held[number][:rows]


class _Loop(torch.autograd.Function):
    """`mixture` expert by expert, weights (M,) and rows (M,) sorted by expert, counts (E,)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w_in: Tensor, w_out: Tensor, weights: Tensor, rows: Tensor, counts: Tensor
    ) -> Tensor:
        chunks = _chunks(counts.tolist())
        inner, outer = w_in.unbind(), w_out.unbind()
        h = x.new_empty(len(rows), w_in.shape[2])
        y = torch.zeros(x.shape, dtype=_wide(x.dtype), device=x.device)
        space = _Space(x, chunks)
        for low, high, experts, sizes in chunks:
            mine, n, part = rows[low:high], high - low, h[low:high]
            given = torch.index_select(x, 0, mine, out=space(0, n, x.shape[1]))
            own = torch.split(given, sizes)
            for e, rows_in, rows_h in zip(experts, own, torch.split(part, sizes), strict=True):
                torch.mm(rows_in, inner[e], out=rows_h)
            gate, up = part.chunk(2, dim=1)
            silu = torch.ops.aten.silu.out(gate, out=space(1, n, w_out.shape[1]))
            act = silu.mul_(up).mul_(weights[low:high, None])
            for e, rows_act, rows_out in zip(experts, torch.split(act, sizes), own, strict=True):
                torch.mm(rows_act, outer[e], out=rows_out)  # in the place of what is read no more
            y.index_add_(0, mine, given.to(y.dtype))
        ctx.save_for_backward(x, w_in, w_out, weights, rows, h)
        ctx.chunks = chunks
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w_in, w_out, weights, rows, h = ctx.saved_tensors
        grad = grad.to(x.dtype)
        width = w_out.shape[1]
        inner, outer = w_in.mT.unbind(), w_out.mT.unbind()
        all_used = sum(len(chunk.experts) for chunk in ctx.chunks) == len(inner)
        empty = torch.empty_like if all_used else torch.zeros_like
        d_in, d_out = empty(w_in), empty(w_out)
        d_inner, d_outer = d_in.unbind(), d_out.unbind()
        d_x = torch.zeros(x.shape, dtype=_wide(x.dtype), device=x.device)
        d_weights = torch.empty_like(weights)
        space = _Space(x, ctx.chunks)
        for low, high, experts, sizes in ctx.chunks:
            mine, n, scale = rows[low:high], high - low, weights[low:high, None]
            given = torch.index_select(x, 0, mine, out=space(0, n, x.shape[1]))
            above = torch.index_select(grad, 0, mine, out=space(1, n, x.shape[1]))
            gate, up = h[low:high].chunk(2, dim=1)
            d_act, own = space(2, n, width), torch.split(above, sizes)
            for e, rows_above, rows_act in zip(experts, own, torch.split(d_act, sizes), strict=True):
                torch.mm(rows_above, outer[e], out=rows_act)
            silu = torch.ops.aten.silu.out(gate, out=space(3, n, width))
            act = torch.mul(silu, up, out=space(4, n, width))
            d_h = space(5, n, 2 * width)
            d_gate, d_up = d_h.chunk(2, dim=1)
            torch.sum(torch.mul(d_act, act, out=d_up), dim=1, out=d_weights[low:high])
            act *= scale
            d_act *= scale
            torch.mul(d_act, silu, out=d_up)
            torch.ops.aten.silu_backward.grad_input(d_act.mul_(up), gate, grad_input=d_gate)
            parts = (own, torch.split(act.mT, sizes, 1), torch.split(given.mT, sizes, 1), torch.split(d_h, sizes))
            for e, rows_above, act_t, given_t, rows_h in zip(experts, *parts, strict=True):
                torch.mm(act_t, rows_above, out=d_outer[e])
                torch.mm(given_t, rows_h, out=d_inner[e])
                torch.mm(rows_h, inner[e], out=rows_above)
            d_x.index_add_(0, mine, above.to(d_x.dtype))
        return d_x.to(x.dtype), d_in, d_out, d_weights, None, None
