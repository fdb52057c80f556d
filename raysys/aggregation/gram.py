"""The survey of a stack: which rows are finite, and all inner products, block of columns by block.

Shapes: stack (n, d); m = n + 1, or n + 2 with a reference; grams (blocks, m, m) float64.

Notable choices
- Every rule that is not coordinate-wise returns a linear combination of its inputs whose coefficients depend on inner
  products only. One pass over the data gives those products, all logic is n x n, a second pass combines (spec 2.8).
- Each block is centred on its coordinate-wise median, which Byzantine rows cannot drag away: models with a common offset
  10 and a spread of 1e-3 keep six digits, and if most rows are equal their centred rows, hence their distances, are exactly 0.
- The origin is a row (minus the centre), so norms are distances to it; so is the reference (a previous output).
- Blocks are fixed (BLOCK columns) and summed in coordinate order, so a sharded survey has the bits of an unsharded one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from raysys.aggregation import kernels
from raysys.aggregation.columns import coordinate_into, float_bits, native
from raysys.aggregation.kernels import BLOCK

F64 = NDArray[np.float64]

_SLAB = 8 * BLOCK


@dataclass(frozen=True)
class Survey:
    """What rules need to know of a stack. `grams` are centred per block; rows n.. are the anchors (origin, reference)."""

    finite: NDArray[np.bool_]
    grams: F64 | None
    has_reference: bool
    transform: F64 | None = None
    """Affine row map (m', m) applied on top of the grams; None for the identity."""

    @property
    def n(self) -> int:
        return len(self.finite)

    @property
    def gram(self) -> F64:
        """(m, m) inner products of all rows and anchors around a common centre, summed over blocks in order."""
        return self.gram_of(slice(None))

    def gram_of(self, blocks: slice | NDArray[np.intp]) -> F64:
        """The part of `gram` that comes from the given blocks of columns."""
        if self.grams is None:
            raise ValueError("this survey was taken with products=False and has no inner products")
        chosen = self.grams[blocks]
        total: F64 = chosen[0] if len(chosen) == 1 else np.add.reduce(chosen, axis=0) if len(chosen) else np.zeros(0)
        return total if self.transform is None else self.transform @ total @ self.transform.T

    @staticmethod
    def join(parts: Sequence[Survey]) -> Survey:
        """One survey of the whole from surveys of its shards, given in coordinate order."""
        if not parts:
            raise ValueError("join needs at least one survey, got none")
        first = parts[0]
        if any(p.n != first.n or p.has_reference != first.has_reference or p.transform is not None for p in parts):
            raise ValueError(f"shards differ in rows or anchors: n={[p.n for p in parts]}")
        finite = np.logical_and.reduce([p.finite for p in parts])
        grams = None if first.grams is None else np.concatenate([p.grams for p in parts if p.grams is not None])
        return Survey(finite, grams, first.has_reference)

    def restrict(self, rows: NDArray[np.intp]) -> Survey:
        """The survey of some rows only; the anchors stay."""
        if len(rows) == self.n:
            return self
        m = self.n + 1 + self.has_reference
        pick = np.zeros((len(rows) + m - self.n, m))
        kept = np.concatenate([rows, np.arange(self.n, m)])
        pick[np.arange(len(kept)), kept] = 1.0
        return replace(self, finite=self.finite[rows], transform=self._then(pick))

    def mix(self, matrix: F64) -> Survey:
        """The survey of the rows `matrix` @ [stack; origin; reference], matrix (n', m); the anchors stay."""
        m = self.n + 1 + self.has_reference
        if matrix.shape[1] != m:
            raise ValueError(
                f"a mixing matrix over {self.n} rows and {m - self.n} anchors needs {m} columns, got {matrix.shape[1]}"
            )
        full = np.vstack([matrix, np.eye(m)[self.n :]])
        # The origin is zero, so its coefficient is free; with rows that sum to one the map commutes with centring.
        full[:, self.n] += 1.0 - full.sum(1)
        return replace(self, finite=np.ones(len(matrix), bool), transform=self._then(full))

    def _then(self, step: F64) -> F64:
        return step if self.transform is None else step @ self.transform


def survey(stack: torch.Tensor, reference: torch.Tensor | None = None, *, products: bool = True) -> Survey:
    """Survey a stack, or a shard of its columns.

    stack: (n, d) tensor, float16, bfloat16, float32 or float64, on any device; never written to. reference: (d,) or None.
    products: False if only finiteness matters (coordinate-wise rules).
    Raises ValueError for other shapes or types.
    """
    if stack.ndim != 2 or stack.shape[0] == 0:
        raise ValueError(f"a stack has shape (n, d) with n >= 1, got {tuple(stack.shape)}")
    if not stack.is_floating_point():
        raise ValueError(f"a stack holds floats (float16, bfloat16, float32, float64), got {stack.dtype}")
    if reference is not None and reference.shape != stack.shape[1:]:
        raise ValueError(f"the reference has shape {tuple(reference.shape)}, the stack needs {tuple(stack.shape[1:])}")
    if stack.is_cuda:
        from raysys.aggregation import device

        return device.survey(stack, reference, products=products)
    n, d = stack.shape
    m = n + 1 + (reference is not None)
    blocks = -(-d // BLOCK)
    finite = np.ones(n, bool)
    grams = np.zeros((max(blocks, 1), m, m)) if products else None
    for start in range(0, d, _SLAB):
        part = native(stack[:, start : start + _SLAB])
        ref = (
            native(reference[None, start : start + _SLAB])[0].astype(part.dtype, copy=False)
            if reference is not None
            else part[0, :0]
        )
        first = start // BLOCK
        last = min(blocks, first + _SLAB // BLOCK)
        flags = _finite(part, last - first)
        finite &= flags.all(0)
        if grams is not None:
            centre = _centre(part, flags)
            bits = float_bits(part.dtype)
            kernels.block_grams(part, centre, ref, flags, bits.mask, bits.shift, bits.bias, grams[first:last])
    if grams is not None:
        # A finite row whose square overflows float64 (beyond 1e154) has no usable distances: it counts as not finite.
        with np.errstate(invalid="ignore"):
            finite &= np.isfinite(np.einsum("bii->i", grams)[:n])
        if not finite.all():
            grams[:, :n][:, ~finite] = 0.0
            grams[:, :, :n][:, :, ~finite] = 0.0
    return Survey(finite, grams, reference is not None)


def _finite(part: NDArray, blocks: int) -> NDArray[np.bool_]:
    """(blocks, n): is the row finite within the block."""
    bits = float_bits(part.dtype)
    tops = np.empty((blocks, len(part)), bits.mask.dtype)
    view = part.view(bits.mask.dtype)
    for b in range(blocks):
        kernels.row_tops(view[:, b * BLOCK : (b + 1) * BLOCK], bits.mask[0], tops[b])
    return tops < bits.infinity


def _centre(part: NDArray, flags: NDArray[np.bool_]) -> NDArray:
    """Coordinate-wise median of the rows that are finite in each block: (d,)."""
    n, d = part.shape
    centre = np.empty(d, part.dtype)
    if flags.all():
        coordinate_into(part, np.arange(n), "median", 0, n, centre)
        return centre
    for b, row in enumerate(flags):
        rows = np.flatnonzero(row)
        block = slice(b * BLOCK, min(d, (b + 1) * BLOCK))
        if len(rows) == 0:
            centre[block] = 0
        else:
            coordinate_into(part[:, block], rows, "median", 0, len(rows), centre[block])
    return centre
