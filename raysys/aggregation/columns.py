"""Column-wise work on stacks of any supported type: the bridge between torch tensors and the compiled kernels.

Shapes: stack (n, d), out (d,).

Notable choices
- float32 and float64 are worked on in place of their memory (which may be read-only); half precisions are widened to
  float32 a slab of columns at a time and rounded once at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from raysys.aggregation import device, kernels, networks

F64 = NDArray[np.float64]


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


KINDS = {
    "median": kernels.MEDIAN,
    "trimmed": kernels.TRIMMED,
    "near_median": kernels.NEAR_MEDIAN,
    "near_trimmed": kernels.NEAR_TRIMMED,
}

_SLAB = 65536
_MIX_SLAB = 8192


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
    return _BITS[np.dtype(dtype)]


def native(part: torch.Tensor) -> NDArray:
    """A (n, d) numpy view of a CPU tensor, or a float32 copy if its type is half precision or its rows are strided."""
    if part.dtype in (torch.float16, torch.bfloat16):
        part = part.float()
    array = part.detach().numpy()
    return array if array.strides[1] == array.itemsize or array.shape[1] <= 1 else np.ascontiguousarray(array)


def _pairs(n: int, kind: str, f: int) -> NDArray[np.int64]:
    key = (n, kind if kind in ("median", "trimmed") else "sort", f if kind == "trimmed" else 0)
    if key not in _PAIRS:
        if key[1] == "median":
            comparators = networks.median_network(n)
        elif key[1] == "trimmed":
            comparators = networks.trimmed_network(n, f)
        else:
            comparators = networks.batcher(n)
        _PAIRS[key] = np.array(comparators, np.int64).reshape(-1, 2)
    return _PAIRS[key]


_PAIRS: dict[tuple[int, str, int], NDArray[np.int64]] = {}


def coordinate_into(x: NDArray, rows: NDArray[np.intp], kind: str, f: int, keep: int, out: NDArray) -> None:
    """out <- the coordinate-wise rule `kind` over rows `rows` of x (n, d). See `kernels.coordinate`."""
    kernels.coordinate(x, rows, _pairs(len(rows), kind, f), KINDS[kind], f, keep, out)


def coordinate(stack: torch.Tensor, rule: Coordinatewise) -> torch.Tensor:
    """A coordinate-wise rule over the columns of a stack (n, d): (d,)."""
    rows = np.arange(stack.shape[0]) if rule.rows is None else rule.rows
    if stack.is_cuda:
        return device.coordinate(stack, rule, rows)
    return _by_slab(stack, lambda part, _, out: _coordinate_part(part, rule, rows, out), None)


def _coordinate_part(part: NDArray, rule: Coordinatewise, rows: NDArray[np.intp], out: NDArray) -> None:
    if rule.weights is not None:
        pairs = _pairs(len(rows), "sort", 0)
        kernels.weighted_coordinate(part, rows, rule.weights, pairs, rule.kind == "median", rule.mass, out)
    else:
        coordinate_into(part, rows, rule.kind, rule.f, rule.keep, out)


def combine(stack: torch.Tensor, weights: F64, reference: torch.Tensor | None, bias: float) -> torch.Tensor:
    """weights (n,) @ stack (n, d) + bias * reference, in float64 around the heaviest row: (d,)."""
    if stack.is_cuda:
        return device.combine(stack, weights, reference, bias)
    rows = np.flatnonzero(weights)
    base = int(np.argmax(weights))
    total = _snap(float(weights.sum()) + bias)
    ref = reference if bias != 0.0 else None
    if len(rows) == 1 and total == 1.0 and bias == 0.0:
        return stack[base].clone()
    used = weights[rows]

    def part(x: NDArray, r: NDArray, out: NDArray) -> None:
        kernels.combine(x, rows, used, r, bias, base, total, out)

    return _by_slab(stack, part, ref)


def mixed_coordinate(
    stack: torch.Tensor, rule: Coordinatewise, matrix: F64, base: int, reference: torch.Tensor | None
) -> torch.Tensor:
    """A coordinate-wise rule over the rows matrix (n', n + 2) @ [stack; origin; reference]: (d,)."""
    if stack.is_cuda:
        return device.coordinate(device.mix(stack, matrix, base, reference), rule, np.arange(len(matrix)))
    ref = reference if matrix[:, -1].any() else None
    buffers: dict[int, NDArray] = {}
    rows = np.arange(len(matrix)) if rule.rows is None else rule.rows

    def part(x: NDArray, r: NDArray, out: NDArray) -> None:
        for start in range(0, x.shape[1], _MIX_SLAB):
            piece = slice(start, min(start + _MIX_SLAB, x.shape[1]))
            width = piece.stop - start
            if width not in buffers:
                buffers[width] = np.empty((len(matrix), width), x.dtype)
            _mix_into(x[:, piece], matrix, base, r[piece], buffers[width])
            _coordinate_part(buffers[width], rule, rows, out[piece])

    return _by_slab(stack, part, ref)


def mix(stack: torch.Tensor, matrix: F64, base: int, reference: torch.Tensor | None = None) -> torch.Tensor:
    """The rows matrix (n', n + 2) @ [stack; origin; reference], mixed around row `base`: (n', d)."""
    if stack.is_cuda:
        return device.mix(stack, matrix, base, reference)
    out = torch.empty((len(matrix), stack.shape[1]), dtype=stack.dtype)
    for start in range(0, stack.shape[1], _SLAB):
        piece = slice(start, start + _SLAB)
        x = native(stack[:, piece])
        r = x[0, :0] if reference is None else native(reference[None, piece])[0]
        if out.dtype in (torch.float16, torch.bfloat16):
            buffer = np.empty((len(matrix), x.shape[1]), np.float32)
            _mix_into(x, matrix, base, r, buffer)
            out[:, piece] = torch.from_numpy(buffer)
        else:
            _mix_into(x, matrix, base, r, out[:, piece].numpy())
    return out


def _mix_into(x: NDArray, matrix: F64, base: int, reference: NDArray, out: NDArray) -> None:
    n = len(x)
    bias = np.ascontiguousarray(matrix[:, n + 1])
    totals = np.array([_snap(t) for t in matrix[:, :n].sum(1) + bias])
    kernels.mix(x, np.ascontiguousarray(matrix[:, :n]), totals, base, reference, bias, out)


def _snap(total: float) -> float:
    """A sum of shares that rounding left beside one is one."""
    return 1.0 if abs(total - 1.0) < 1e-12 else total


def _by_slab(
    stack: torch.Tensor, work: Callable[[NDArray, NDArray, NDArray], None], reference: torch.Tensor | None
) -> torch.Tensor:
    """Run `work(columns (n, k), reference (k,) or empty, out (k,))` over the stack; half precisions in float32 slabs."""
    d = stack.shape[1]
    out = torch.empty(d, dtype=stack.dtype)
    narrow = stack.dtype in (torch.float16, torch.bfloat16)
    width = _SLAB if narrow else max(d, 1)
    for start in range(0, d, width):
        piece = slice(start, min(start + width, d))
        x = native(stack[:, piece])
        r = x[0, :0] if reference is None else native(reference[None, piece])[0]
        if narrow:
            buffer = np.empty(x.shape[1], np.float32)
            work(x, r, buffer)
            out[piece] = torch.from_numpy(buffer)
        else:
            work(x, r, out[piece].numpy())
    return out
