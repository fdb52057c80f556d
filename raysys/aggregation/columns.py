"""Column-wise work on stacks of any supported type: the bridge between torch tensors and the compiled kernels.

Shapes: stack (n, d), out (d,).

Notable choices
- float32 and float64 are worked on in place (their memory may be read-only); half precisions are widened to float32 a
  slab of columns at a time and rounded once at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from raysys.aggregation import columnwise, compiled, device, kernels, networks

F64 = NDArray[np.float64]

KINDS = {
    "median": columnwise.MEDIAN,
    "trimmed": columnwise.TRIMMED,
    "near_median": columnwise.NEAR_MEDIAN,
    "near_trimmed": columnwise.NEAR_TRIMMED,
}

_SLAB = 65536
_MIX_SLAB = 8192


class Coordinatewise(NamedTuple):
    """A coordinate-wise rule over `rows` (all of them if None)."""

    kind: str
    """'median'; 'trimmed': mean of ranks f..n-f-1; 'near_median', 'near_trimmed': mean of the `keep` nearest to that."""
    f: int = 0
    keep: int = 0
    rows: NDArray[np.intp] | None = None
    weights: F64 | None = None
    """Shares that sum to one: the weighted median, or the mean without `mass` of weight at either end."""
    mass: float = 0.0


class Bits(NamedTuple):
    """How a float type is laid out as an integer."""

    mask: NDArray
    infinity: int
    shift: int
    bias: int


_BITS = {
    np.dtype(np.float32): Bits(np.array([0x7FFFFFFF], np.int32), 0x7F800000, 23, 127),
    np.dtype(np.float64): Bits(np.array([0x7FFFFFFFFFFFFFFF], np.int64), 0x7FF0000000000000, 52, 1023),
}


def float_bits(dtype: np.dtype) -> Bits:
    return _BITS[dtype]


class Block(NamedTuple):
    """A stack (n, d) as the kernels take it: x[i, k] = flat[i * stride + k]."""

    flat: NDArray
    stride: int
    n: int
    d: int

    def columns(self, start: int, stop: int) -> Block:
        return Block(self.flat[start:], self.stride, self.n, stop - start)


def block(part: torch.Tensor) -> Block:
    """A CPU tensor (n, d) as a Block: its own memory, or a float32 copy if half precision or without adjacent columns."""
    if part.dtype in (torch.float16, torch.bfloat16):
        part = part.float()
    n, d = part.shape
    if part.stride(1) != 1 and d > 1:
        part = part.contiguous()
    stride = part.stride(0) if n > 1 else d
    length = (n - 1) * stride + d if d else 0
    return Block(part.detach().as_strided((length,), (1,)).numpy(), stride, n, d)


def vector(part: torch.Tensor | None, like: Block) -> NDArray:
    """A (d,) tensor in the precision of a block; (0,) for None."""
    return like.flat[:0] if part is None else block(part[None]).flat.astype(like.flat.dtype, copy=False)


_PAIRS: dict[tuple[int, str, int], NDArray[np.int64]] = {}


def _pairs(n: int, kind: str, f: int) -> NDArray[np.int64]:
    key = (n, kind, f if kind == "trimmed" else 0)
    if key not in _PAIRS:
        if kind == "median":
            network = networks.median_network(n)
        elif kind == "trimmed":
            network = networks.trimmed_network(n, f)
        else:
            network = networks.batcher(n)
        _PAIRS[key] = np.array(network, np.int64).reshape(-1, 2)
    return _PAIRS[key]


def coordinate_into(x: Block, rows: NDArray[np.intp], rule: Coordinatewise, out: NDArray) -> bool:
    """out <- the unweighted rule over rows `rows` of x. Returns False only if a value met was not finite."""
    n = len(rows)
    function = compiled.kernel(n, rule.kind, rule.f, rule.keep, x.flat.dtype, x.d)
    if function is not None and x.d >= compiled.lanes(x.flat.dtype):
        return compiled.run(function, x.flat, x.stride, rows, out) < float_bits(x.flat.dtype).infinity
    if n > compiled.LARGEST:
        _sorted_into(x, rows, rule, out)
    else:
        _plain(x, rows, rule, _pairs(n, rule.kind, rule.f), out)
    return all_finite(x)


def _plain(x: Block, rows: NDArray[np.intp], rule: Coordinatewise, pairs: NDArray, out: NDArray) -> None:
    columnwise.coordinate(x.flat, x.stride, x.d, rows, pairs, KINDS[rule.kind], rule.f, rule.keep, out)


def _sorted_into(x: Block, rows: NDArray[np.intp], rule: Coordinatewise, out: NDArray) -> None:
    """By numpy's sort, for more rows than a network is good for."""
    n, width = len(rows), max(1, _SLAB // 16)
    nothing = np.empty((0, 2), np.int64)
    for start in range(0, x.d, width):
        stop = min(start + width, x.d)
        tall = np.stack([x.flat[r * x.stride + start : r * x.stride + stop] for r in rows], axis=1)
        tall.sort(axis=1)
        ranked = Block(np.ascontiguousarray(tall.T).reshape(-1), stop - start, n, stop - start)
        _plain(ranked, np.arange(n), rule, nothing, out[start:stop])


def row_tops(x: Block, start: int, stop: int) -> NDArray:
    """(n,) largest magnitude of each row in some columns, as bits; `float_bits(...).infinity` and above is not finite."""
    bits = float_bits(x.flat.dtype)
    tops = np.empty(x.n, bits.mask.dtype)
    kernels.row_tops(x.flat.view(bits.mask.dtype), x.stride, start, stop, bits.mask, tops)
    return tops


def all_finite(x: Block) -> bool:
    return bool((row_tops(x, 0, x.d) < float_bits(x.flat.dtype).infinity).all())


def coordinate(stack: torch.Tensor, rule: Coordinatewise) -> tuple[torch.Tensor, bool]:
    """A coordinate-wise rule over the columns of a stack (n, d): (d,), and whether all values met were finite."""
    rows = np.arange(stack.shape[0]) if rule.rows is None else rule.rows
    if stack.is_cuda:
        return device.coordinate(stack, rule, rows), bool(torch.isfinite(stack).all())
    finite = True

    def part(x: Block, _: NDArray, out: NDArray) -> None:
        nonlocal finite
        finite &= _coordinate_part(x, rule, rows, out)

    return _by_slab(stack, part, None), finite


def _coordinate_part(x: Block, rule: Coordinatewise, rows: NDArray[np.intp], out: NDArray) -> bool:
    if rule.weights is None:
        return coordinate_into(x, rows, rule, out)
    pairs = _pairs(len(rows), "sort", 0)
    median = rule.kind == "median"
    columnwise.weighted_coordinate(x.flat, x.stride, x.d, rows, rule.weights, pairs, median, rule.mass, out)
    return all_finite(x)


def combine(
    stack: torch.Tensor, weights: F64, reference: torch.Tensor | None, bias: float, into: torch.Tensor | None = None
) -> torch.Tensor:
    """weights (n,) @ stack (n, d) + bias * reference, in float64: (d,), written to `into` if given (CPU)."""
    rows = np.flatnonzero(weights)
    base = int(weights.argmax())
    total = _snap(float(weights.sum()) + bias)
    if len(rows) == 1 and total == 1.0 and bias == 0.0:
        return stack[base].clone() if into is None else into.copy_(stack[base])
    if stack.is_cuda:
        return device.combine(stack, weights, reference, bias)
    ref = reference if bias != 0.0 else None
    used = weights[rows]

    def part(x: Block, r: NDArray, out: NDArray) -> None:
        if x.flat.dtype == np.float32 and bias == 0.0 and len(used) and (used == used[0]).all():
            columnwise.average(x.flat, x.stride, x.d, rows, used[0], out)
        elif x.flat.dtype == np.float32:
            columnwise.combine(x.flat, x.stride, x.d, rows, used, r, bias, out)
        else:
            columnwise.combine_around(x.flat, x.stride, x.d, rows, used, r, bias, base, total, out)

    return _by_slab(stack, part, ref, into)


def mixed_coordinate(
    stack: torch.Tensor, rule: Coordinatewise, matrix: F64, base: int, reference: torch.Tensor | None
) -> torch.Tensor:
    """A coordinate-wise rule over the rows matrix (n', n + 2) @ [stack; origin; reference]: (d,)."""
    rows = np.arange(len(matrix)) if rule.rows is None else rule.rows
    if stack.is_cuda:
        return device.coordinate(device.mix(stack, matrix, base, reference), rule, rows)
    ref = reference if matrix[:, -1].any() else None
    scratch: dict[str, NDArray] = {}

    def part(x: Block, r: NDArray, out: NDArray) -> None:
        for start in range(0, x.d, _MIX_SLAB):
            stop = min(start + _MIX_SLAB, x.d)
            if not scratch:
                scratch["mixed"] = np.empty(len(matrix) * (stop - start), x.flat.dtype)
            mixed = Block(scratch["mixed"][: len(matrix) * (stop - start)], stop - start, len(matrix), stop - start)
            _mix_into(x.columns(start, stop), matrix, base, r[start:stop], mixed.flat)
            _coordinate_part(mixed, rule, rows, out[start:stop])

    return _by_slab(stack, part, ref)


def mix(stack: torch.Tensor, matrix: F64, base: int, reference: torch.Tensor | None = None) -> torch.Tensor:
    """The rows matrix (n', n + 2) @ [stack; origin; reference], mixed around row `base`: (n', d)."""
    if stack.is_cuda:
        return device.mix(stack, matrix, base, reference)
    x = block(stack)
    out = np.empty(len(matrix) * x.d, x.flat.dtype)
    _mix_into(x, matrix, base, vector(reference, x), out)
    return torch.from_numpy(out.reshape(len(matrix), x.d)).to(stack.dtype)


def _mix_into(x: Block, matrix: F64, base: int, reference: NDArray, out: NDArray) -> None:
    n = x.n
    bias = np.ascontiguousarray(matrix[:, n + 1])
    totals = matrix[:, :n].sum(1) + bias
    totals[np.abs(totals - 1.0) < 1e-12] = 1.0
    columnwise.mix(x.flat, x.stride, n, x.d, np.ascontiguousarray(matrix[:, :n]), totals, base, reference, bias, out)


def norms(stack: torch.Tensor) -> F64:
    """(n,) Euclidean norms in float64; not finite where the row is not."""
    if stack.is_cuda:
        return torch.linalg.vector_norm(stack, dim=1, dtype=torch.float64).cpu().numpy()
    x = block(stack)
    out = np.empty(x.n)
    kernels.row_norms(x.flat, x.stride, x.d, out)
    return out


def scale(stack: torch.Tensor, factors: F64) -> torch.Tensor:
    """factors (n,) times the rows: (n, d)."""
    return (stack * torch.from_numpy(factors).to(stack.device)[:, None].to(max_precision(stack.dtype))).to(stack.dtype)


def max_precision(dtype: torch.dtype) -> torch.dtype:
    """The type that factors are held in: float32 for half precisions."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _snap(total: float) -> float:
    """A sum of shares that rounding left beside one is one."""
    return 1.0 if abs(total - 1.0) < 1e-12 else total


def _by_slab(
    stack: torch.Tensor,
    work: Callable[[Block, NDArray, NDArray], None],
    reference: torch.Tensor | None,
    into: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run `work(columns, reference (k,) or empty, out (k,))` over the stack; half precisions in float32 slabs."""
    d = stack.shape[1]
    out = torch.empty(d, dtype=stack.dtype) if into is None else into
    if stack.dtype in (torch.float32, torch.float64):
        x = block(stack)
        work(x, vector(reference, x), out.numpy())
        return out
    for start in range(0, d, _SLAB):
        piece = slice(start, min(start + _SLAB, d))
        x = block(stack[:, piece])
        wide = np.empty(x.d, np.float32)
        work(x, vector(None if reference is None else reference[piece], x), wide)
        out[piece] = torch.from_numpy(wide)
    return out
