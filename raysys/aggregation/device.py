"""The same work on CUDA, through torch.

Shapes: stack (n, d), m = rows + anchors, grams (blocks, m, m).

Notable choices
- Products and combinations are done in float64: the pass is bound by memory, and 1e30 does not overflow.
- Not bit-equal to the CPU kernels (agreement to rounding), but the same shards give the same bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from raysys.aggregation.kernels import BLOCK

if TYPE_CHECKING:
    from raysys.aggregation.columns import Coordinatewise
    from raysys.aggregation.gram import Survey

_SLAB = 64 * BLOCK


def survey(stack: torch.Tensor, reference: torch.Tensor | None, *, products: bool | str) -> Survey:
    from raysys.aggregation.gram import Survey

    n, d = stack.shape
    m = n + 1 + (reference is not None)
    finite = torch.ones(n, dtype=torch.bool, device=stack.device)
    grams = []
    for start in range(0, max(d, 1), _SLAB):
        part = stack[:, start : start + _SLAB].double()
        bad = ~torch.isfinite(part).all(1)
        finite &= ~bad
        if not products:
            continue
        centre = _median(part, bad)
        rows = [torch.where(bad[:, None], 0.0, part - centre), -centre[None]]
        if reference is not None:
            rows.append((reference[start : start + _SLAB].double() - centre)[None])
        y = torch.cat(rows)
        pad = -y.shape[1] % BLOCK
        y = torch.nn.functional.pad(y, (0, pad)).view(m, -1, BLOCK).transpose(0, 1)
        grams.append((y @ y.mT).cpu().numpy())
    return Survey(finite.cpu().numpy(), np.concatenate(grams) if products else None, reference is not None)


def _median(part: torch.Tensor, bad: torch.Tensor) -> torch.Tensor:
    rows = part[~bad].sort(0).values
    k = len(rows)
    return 0.5 * rows[(k - 1) // 2] + 0.5 * rows[k // 2] if k else torch.zeros_like(part[0])


def coordinate(stack: torch.Tensor, rule: Coordinatewise, rows: NDArray[np.intp]) -> torch.Tensor:
    n = len(rows)
    out = torch.empty(stack.shape[1], dtype=stack.dtype, device=stack.device)
    pick = torch.from_numpy(np.ascontiguousarray(rows)).to(stack.device)
    for start in range(0, stack.shape[1], _SLAB):
        piece = slice(start, start + _SLAB)
        x = stack[:, piece]
        x = (x if n == len(x) else x[pick]).to(torch.float64 if stack.dtype == torch.float64 else torch.float32)
        values, order = x.sort(0)
        out[piece] = _weighted(values, order, rule) if rule.weights is not None else _ranked(values, rule)
    return out


def _ranked(x: torch.Tensor, rule: Coordinatewise) -> torch.Tensor:
    n, f = len(x), rule.f
    if rule.kind in ("median", "near_median"):
        centre = 0.5 * x[(n - 1) // 2] + 0.5 * x[n // 2]
    else:
        centre = x[f] + (x[f : n - f] - x[f]).mean(0)
    if rule.kind in ("median", "trimmed"):
        return centre
    nearest = (x - centre).abs().argsort(dim=0, stable=True)[: rule.keep]
    return centre + (x.gather(0, nearest) - centre).mean(0)


def _weighted(x: torch.Tensor, order: torch.Tensor, rule: Coordinatewise) -> torch.Tensor:
    assert rule.weights is not None
    upto = torch.from_numpy(rule.weights).to(x.device)[order].cumsum(0)
    if rule.kind == "median":
        low = (upto < 0.5 - 1e-12).sum(0, keepdim=True).clamp(max=len(x) - 1)
        high = (upto <= 0.5 + 1e-12).sum(0, keepdim=True).clamp(max=len(x) - 1)
        return (0.5 * x.gather(0, low) + 0.5 * x.gather(0, high))[0]
    before = torch.cat([torch.zeros_like(upto[:1]), upto[:-1]])
    share = (upto.clamp(max=1 - rule.mass) - before.clamp(min=rule.mass)).clamp(min=0)
    share[share <= 1e-12] = 0
    base = x.gather(0, share.argmax(0, keepdim=True))
    # Cut-off rows may be huge: zero them before the product.
    offset = torch.where(share > 0, x - base, 0).double()
    return (base[0] + (share * offset).sum(0) / share.sum(0)).to(x.dtype)


def combine(
    stack: torch.Tensor, weights: NDArray[np.float64], reference: torch.Tensor | None, bias: float
) -> torch.Tensor:
    matrix = np.append(weights, [0.0, bias])[None]
    return mix(stack, matrix, int(np.argmax(weights)), reference)[0]


def mix(stack: torch.Tensor, matrix: NDArray[np.float64], base: int, reference: torch.Tensor | None) -> torch.Tensor:
    n, d = stack.shape
    used = np.flatnonzero(matrix[:, :n].any(0))
    rows = torch.from_numpy(used).to(stack.device)
    left = torch.from_numpy(np.ascontiguousarray(matrix[:, used])).to(stack.device)
    bias = torch.from_numpy(np.ascontiguousarray(matrix[:, n + 1])).to(stack.device)
    total = left.sum(1) + bias
    total = torch.where((total - 1).abs() < 1e-12, 1.0, total)
    out = torch.empty((len(matrix), d), dtype=stack.dtype, device=stack.device)
    for start in range(0, d, _SLAB):
        piece = slice(start, start + _SLAB)
        anchor = stack[base, piece].double() if base >= 0 else torch.zeros_like(stack[0, piece], dtype=torch.float64)
        value = total[:, None] * anchor + left @ (stack[rows, piece].double() - anchor)
        if reference is not None:
            value += bias[:, None] * (reference[piece].double() - anchor)
        out[:, piece] = value.to(stack.dtype)
    return out
