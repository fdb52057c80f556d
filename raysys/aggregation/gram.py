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
from raysys.aggregation.columns import Block, Coordinatewise, block, coordinate_into, float_bits, row_tops, vector
from raysys.aggregation.kernels import BLOCK

F64 = NDArray[np.float64]

_SLAB = 8  # blocks: what stays in cache between the median and the products
_MEDIAN = Coordinatewise("median")


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


def survey(stack: torch.Tensor, reference: torch.Tensor | None = None, *, products: bool | str = True) -> Survey:
    """Survey a stack, or a shard of its columns.

    stack: (n, d) tensor, float16, bfloat16, float32 or float64, on any device; never written to. reference: (d,) or None.
    products: the rule's `least`: True; False if only finiteness matters (coordinate-wise rules); 'norms' if only
    norms and distances to the reference do (then inner products between rows are left at zero).
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
    for first in range(0, blocks, _SLAB):
        last = min(blocks, first + _SLAB)
        piece = slice(first * BLOCK, min(d, last * BLOCK))
        x = block(stack[:, piece])
        ref = vector(None if reference is None else reference[piece], x)
        if products == "norms":
            assert grams is not None
            kernels.block_norms(x.flat, x.stride, n, x.d, ref, grams[first:last])
        elif grams is None:
            finite &= row_tops(x, 0, x.d) < float_bits(x.flat.dtype).infinity
        else:
            finite &= _products(x, ref, grams[first:last])
    if grams is not None:
        # A finite row whose square overflows float64 (beyond 1e154) has no usable distances: it counts as not finite.
        finite &= np.isfinite(np.einsum("bii->bi", grams)[:, :n]).all(0)
        if not finite.all():
            grams[:, :n][:, ~finite] = 0.0
            grams[:, :, :n][:, :, ~finite] = 0.0
    return Survey(finite, grams, reference is not None)


def _products(x: Block, reference: NDArray, grams: F64) -> NDArray[np.bool_]:
    """Fills grams (blocks, m, m) for a slab; returns which rows are finite, (n,).

    Takes all values for finite first; blocks where some are not are done again without those rows.
    """
    bits = float_bits(x.flat.dtype)
    flags = np.ones((len(grams), x.n), np.bool_)
    centre = np.empty(x.d, x.flat.dtype)
    coordinate_into(x, np.arange(x.n), _MEDIAN, centre)
    kernels.block_grams(x.flat, x.stride, x.n, x.d, centre, reference, flags, bits.mask, bits.shift, bits.bias, grams)
    for b in (int(b) for b in np.flatnonzero(~flags.all(1))):
        start, stop = b * BLOCK, min(x.d, (b + 1) * BLOCK)
        part, middle = x.columns(start, stop), centre[start:stop]
        flags[b] = row_tops(part, 0, part.d) < bits.infinity
        rows = np.flatnonzero(flags[b])
        if len(rows):
            coordinate_into(part, rows, _MEDIAN, middle)
        else:
            middle[:] = 0
        again = flags[b : b + 1]
        ref = reference[start:stop]
        kernels.block_grams(
            part.flat,
            part.stride,
            part.n,
            part.d,
            middle,
            ref,
            again,
            bits.mask,
            bits.shift,
            bits.bias,
            grams[b : b + 1],
        )
    return np.logical_and.reduce(flags, axis=0)
