"""One round of gossip: every receiver's weighted sum of the rows it hears, and push-sum for directed graphs.

    symmetric, doubly stochastic W:   x_i <- sum_j W_ij x_j, which leaves the mean where it is;
    column-stochastic P (push-sum):   mass_i <- sum_j P_ij mass_j,  z_i <- sum_j P_ij mass_j z_j / mass_i,
    which leaves sum mass and sum mass z. Source: Kempe, Dobra & Gehrke 2003; for training Assran+ 2019 (SGP).

Notable choices
- Columns are cut into tiles that stay in the cache while all receivers pass over them, so that every row comes from memory
  once, however many hear it: memory-bandwidth time on sparse graphs.
- Each value is summed in float64 in the order of the indices and rounded once: its bits depend on neither the tiles, nor
  the block of receivers, nor threads (there are none, and the lock is released), and equal rows stay as they are.

Shapes: m rows (senders), k receivers, d columns; CSR: receiver i has the entries indptr[i] to indptr[i + 1].
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from raysys.graph.mixing import Matrix

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]

TILE = 4096
"""Columns that all receivers pass over before the next ones are read: 1,000 rows of it stay in a third-level cache, and they
are long enough for the memory's prefetcher. Measured with benchmarks/mixing.py: 512 takes twice the time, 16384 half more."""


def to_csr(matrix: Matrix) -> tuple[I64, I64, NDArray[np.float64]]:
    """indptr (k + 1,), indices (e,) ascending within a row, weights (e,) of the entries of (k, m) that are not zero."""
    receivers, indices = np.nonzero(matrix)
    counts = np.bincount(receivers, minlength=len(matrix))
    return np.concatenate([[0], counts.cumsum()]), indices, matrix[receivers, indices]


def mix(rows: F32, indptr: I64, indices: I64, weights: NDArray[np.float64], out: F32 | None = None) -> F32:
    """(k, d) float32: out_i = sum over the entries e of receiver i of weights[e] rows[indices[e]].

    rows (m, d) float32; one that nobody gives weight to is never read. out: (k, d) float32 to fill and return, or a new
    array. ValueError for other types and shapes, or an index outside 0..m-1.
    """
    if rows.dtype != np.float32 or rows.ndim != 2:
        raise ValueError(f"gossip mixes float32 rows of shape (m, d), got {rows.dtype} of shape {rows.shape}")
    if len(indices) and not 0 <= indices.min() <= indices.max() < len(rows):
        raise ValueError(f"an index of gossip lies in 0..{len(rows) - 1}, got {indices.min()} to {indices.max()}")
    rows = np.ascontiguousarray(rows)
    shape = (len(indptr) - 1, rows.shape[1])
    if out is None:
        out = np.empty(shape, dtype=np.float32)
    elif out.shape != shape or out.dtype != np.float32 or np.shares_memory(out, rows):
        raise ValueError(f"gossip writes {shape} float32 apart from its rows, got {out.shape} {out.dtype}")
    _mix(rows, indptr, indices, weights, out)
    return out


def push_sum(z: F32, mass: NDArray[np.float64], matrix: Matrix) -> tuple[F32, NDArray[np.float64]]:
    """A push-sum round: z (m, d) estimates and mass (m,) of the senders become those of the receivers (k, d), (k,).

    matrix: (k, m) rows of a column-stochastic P. Masses begin at one. ValueError where a receiver is left without mass.
    """
    after = (matrix * mass).sum(1)
    if not (after > 0.0).all():
        raise ValueError(f"push-sum needs some mass at every receiver, got {after.min()} at {int(after.argmin())}")
    return mix(z, *to_csr(matrix * mass / after[:, None])), after


@njit(cache=True, nogil=True)
def _mix(rows, indptr, indices, weights, out):  # type: ignore[no-untyped-def]
    """Up to seven entries are summed in registers: a sum of three, five or seven, filled up with weight zero on a row that
    is read anyway, beats a loop over entries."""
    row, share = np.empty(7, np.int64), np.empty(7, np.float64)
    for start in range(0, rows.shape[1], TILE):
        stop = min(rows.shape[1], start + TILE)
        for i in range(out.shape[0]):
            first, last, target = indptr[i], indptr[i + 1], out[i, start:stop]
            if first == last:
                target[:] = 0.0
                continue
            for t in range(7):
                row[t] = indices[min(first + t, last - 1)]
                share[t] = weights[first + t] if first + t < last else 0.0
            if last - first <= 3:
                _three(rows, row, share, start, stop, target)
            elif last - first <= 5:
                _five(rows, row, share, start, stop, target)
            elif last - first <= 7:
                _seven(rows, row, share, start, stop, target)
            else:
                _many(rows, indices[first:last], weights[first:last], start, stop, target)


@njit(cache=True, nogil=True)
def _three(rows, row, share, start, stop, target):  # type: ignore[no-untyped-def]
    w0, w1, w2 = share[0], share[1], share[2]
    x0, x1, x2 = rows[row[0], start:stop], rows[row[1], start:stop], rows[row[2], start:stop]
    for k in range(stop - start):
        target[k] = w0 * np.float64(x0[k]) + w1 * np.float64(x1[k]) + w2 * np.float64(x2[k])


@njit(cache=True, nogil=True)
def _five(rows, row, share, start, stop, target):  # type: ignore[no-untyped-def]
    w0, w1, w2, w3, w4 = share[0], share[1], share[2], share[3], share[4]
    x0, x1, x2 = rows[row[0], start:stop], rows[row[1], start:stop], rows[row[2], start:stop]
    x3, x4 = rows[row[3], start:stop], rows[row[4], start:stop]
    for k in range(stop - start):
        a = w0 * np.float64(x0[k]) + w1 * np.float64(x1[k]) + w2 * np.float64(x2[k])
        target[k] = a + w3 * np.float64(x3[k]) + w4 * np.float64(x4[k])


@njit(cache=True, nogil=True)
def _seven(rows, row, share, start, stop, target):  # type: ignore[no-untyped-def]
    w0, w1, w2, w3, w4, w5, w6 = share[0], share[1], share[2], share[3], share[4], share[5], share[6]
    x0, x1, x2 = rows[row[0], start:stop], rows[row[1], start:stop], rows[row[2], start:stop]
    x3, x4, x5 = rows[row[3], start:stop], rows[row[4], start:stop], rows[row[5], start:stop]
    x6 = rows[row[6], start:stop]
    for k in range(stop - start):
        a = w0 * np.float64(x0[k]) + w1 * np.float64(x1[k]) + w2 * np.float64(x2[k])
        b = w3 * np.float64(x3[k]) + w4 * np.float64(x4[k]) + w5 * np.float64(x5[k])
        target[k] = a + b + w6 * np.float64(x6[k])


@njit(cache=True, nogil=True)
def _many(rows, indices, weights, start, stop, target):  # type: ignore[no-untyped-def]
    """Any number of entries, four at a time; of the columns so few that their sums stay in the first-level cache."""
    acc = np.empty(1024, np.float64)
    for begin in range(start, stop, acc.size):
        end = min(stop, begin + acc.size)
        width, e = end - begin, 0
        acc[:width] = 0.0
        while e + 4 <= indices.size:
            w0, w1, w2, w3 = weights[e], weights[e + 1], weights[e + 2], weights[e + 3]
            x0, x1 = rows[indices[e], begin:end], rows[indices[e + 1], begin:end]
            x2, x3 = rows[indices[e + 2], begin:end], rows[indices[e + 3], begin:end]
            for k in range(width):
                a = w0 * np.float64(x0[k]) + w1 * np.float64(x1[k])
                acc[k] += a + w2 * np.float64(x2[k]) + w3 * np.float64(x3[k])
            e += 4
        while e < indices.size:
            w0, x0 = weights[e], rows[indices[e], begin:end]
            for k in range(width):
                acc[k] += w0 * np.float64(x0[k])
            e += 1
        target[begin - start : end - start] = acc[:width]
