"""Compiled loops over columns, each column on its own (numba, CPU).

Shapes: a stack of n rows and d columns is a flat array and a stride: x[i, k] = flat[i * stride + k].

Notable choices
- Every column sees the same operations in the same order (no fused multiply-add, no reassociation), wherever a stack is
  cut, so shards give the bits of the whole.
- Sums are taken around one of the summed values, or in float64 for float32: equal inputs give that value back exactly.
"""

from __future__ import annotations

import numpy as np
from numba import njit

TILE = 512

MEDIAN, TRIMMED, NEAR_MEDIAN, NEAR_TRIMMED = 0, 1, 2, 3


@njit(cache=True, nogil=True)
def combine(flat, stride, d, rows, weights, reference, bias, out):  # type: ignore[no-untyped-def]
    """out <- sum_i weights[i] * x[rows[i]] + bias * reference, in float64, for float32 rows.

    Rounding the float64 sum once gives back a value that all rows share, exactly.
    """
    tile = 2 * TILE
    acc = np.empty(tile, np.float64)
    for start in range(0, d, tile):
        width = min(tile, d - start)
        for k in range(width):
            acc[k] = 0.0
        i = 0
        while i + 4 <= rows.size:
            w0, w1, w2, w3 = weights[i], weights[i + 1], weights[i + 2], weights[i + 3]
            s0, s1 = rows[i] * stride + start, rows[i + 1] * stride + start
            s2, s3 = rows[i + 2] * stride + start, rows[i + 3] * stride + start
            x0, x1, x2, x3 = flat[s0 : s0 + width], flat[s1 : s1 + width], flat[s2 : s2 + width], flat[s3 : s3 + width]
            for k in range(width):
                acc[k] = (
                    acc[k]
                    + w0 * np.float64(x0[k])
                    + w1 * np.float64(x1[k])
                    + w2 * np.float64(x2[k])
                    + w3 * np.float64(x3[k])
                )
            i += 4
        while i < rows.size:
            w0, s0 = weights[i], rows[i] * stride + start
            x0 = flat[s0 : s0 + width]
            for k in range(width):
                acc[k] = acc[k] + w0 * np.float64(x0[k])
            i += 1
        if bias != 0.0:
            ref = reference[start : start + width]
            for k in range(width):
                acc[k] = acc[k] + bias * np.float64(ref[k])
        target = out[start : start + width]
        for k in range(width):
            target[k] = acc[k]


@njit(cache=True, nogil=True)
def average(flat, stride, d, rows, weight, out):  # type: ignore[no-untyped-def]
    """out <- weight * sum_i x[rows[i]], in float64, for float32 rows: `combine` for equal weights, at the speed of memory.

    Ten rows at a time and long tiles, because the loop waits for memory and for nothing else.
    """
    tile = 8 * TILE
    acc = np.empty(tile, np.float64)
    for start in range(0, d, tile):
        width = min(tile, d - start)
        for k in range(width):
            acc[k] = 0.0
        i = 0
        while i + 10 <= rows.size:
            x0 = flat[rows[i + 0] * stride + start : rows[i + 0] * stride + start + width]
            x1 = flat[rows[i + 1] * stride + start : rows[i + 1] * stride + start + width]
            x2 = flat[rows[i + 2] * stride + start : rows[i + 2] * stride + start + width]
            x3 = flat[rows[i + 3] * stride + start : rows[i + 3] * stride + start + width]
            x4 = flat[rows[i + 4] * stride + start : rows[i + 4] * stride + start + width]
            x5 = flat[rows[i + 5] * stride + start : rows[i + 5] * stride + start + width]
            x6 = flat[rows[i + 6] * stride + start : rows[i + 6] * stride + start + width]
            x7 = flat[rows[i + 7] * stride + start : rows[i + 7] * stride + start + width]
            x8 = flat[rows[i + 8] * stride + start : rows[i + 8] * stride + start + width]
            x9 = flat[rows[i + 9] * stride + start : rows[i + 9] * stride + start + width]
            for k in range(width):
                acc[k] = acc[k] + (
                    np.float64(x0[k])
                    + np.float64(x1[k])
                    + np.float64(x2[k])
                    + np.float64(x3[k])
                    + np.float64(x4[k])
                    + np.float64(x5[k])
                    + np.float64(x6[k])
                    + np.float64(x7[k])
                    + np.float64(x8[k])
                    + np.float64(x9[k])
                )
            i += 10
        while i < rows.size:
            x0 = flat[rows[i] * stride + start : rows[i] * stride + start + width]
            for k in range(width):
                acc[k] = acc[k] + np.float64(x0[k])
            i += 1
        target = out[start : start + width]
        for k in range(width):
            target[k] = weight * acc[k]


@njit(cache=True, nogil=True)
def combine_around(flat, stride, d, rows, weights, reference, bias, base, total, out):  # type: ignore[no-untyped-def]
    """The same for float64 rows, around row `base` so that a value that all rows share comes back exactly.

    total: the sum of the shares, bias included.
    """
    for start in range(0, d, TILE):
        width = min(TILE, d - start)
        anchor = flat[base * stride + start : base * stride + start + width]
        target = out[start : start + width]
        for k in range(width):
            target[k] = total * anchor[k]
        for i in range(rows.size):
            w, s = weights[i], rows[i] * stride + start
            row = flat[s : s + width]
            for k in range(width):
                target[k] += w * (row[k] - anchor[k])
        if bias != 0.0:
            ref = reference[start : start + width]
            for k in range(width):
                target[k] += bias * (ref[k] - anchor[k])


@njit(cache=True, nogil=True)
def mix(flat, stride, n, d, matrix, totals, base, reference, bias, out):  # type: ignore[no-untyped-def]
    """out[i] <- totals[i] * x[base] + sum_j matrix[i, j] * (x[j] - x[base]) + bias[i] * (reference - x[base]).

    base may be -1 for mixing around zero. matrix (k, n), totals (k,), bias (k,), out (k * d) flat. Zero entries of the
    matrix cost nothing. Runs of four coefficients are summed pairwise.
    """
    tile = TILE // 2
    y = np.empty((n, tile), flat.dtype)
    kind = flat.dtype.type
    nothing = np.zeros(tile, flat.dtype)
    used = np.empty(n, np.int64)
    w = np.empty(n + 4, flat.dtype)
    for start in range(0, d, tile):
        width = min(tile, d - start)
        anchor = nothing[:width] if base < 0 else flat[base * stride + start : base * stride + start + width]
        for j in range(n):
            row = flat[j * stride + start : j * stride + start + width]
            target = y[j]
            for k in range(width):
                target[k] = row[k] - anchor[k]
        for i in range(matrix.shape[0]):
            target = out[i * d + start : i * d + start + width]
            t = kind(totals[i])
            for k in range(width):
                target[k] = t * anchor[k]
            count = 0
            for j in range(n):
                if matrix[i, j] != 0.0:
                    used[count] = j
                    w[count] = kind(matrix[i, j])
                    count += 1
            j = 0
            while j + 4 <= count:
                w0, w1, w2, w3 = w[j], w[j + 1], w[j + 2], w[j + 3]
                y0, y1, y2, y3 = y[used[j]], y[used[j + 1]], y[used[j + 2]], y[used[j + 3]]
                for k in range(width):
                    target[k] += (w0 * y0[k] + w1 * y1[k]) + (w2 * y2[k] + w3 * y3[k])
                j += 4
            while j < count:
                w0, y0 = w[j], y[used[j]]
                for k in range(width):
                    target[k] += w0 * y0[k]
                j += 1
            if bias[i] != 0.0:
                t = kind(bias[i])
                ref = reference[start : start + width]
                for k in range(width):
                    target[k] += t * (ref[k] - anchor[k])


@njit(cache=True, nogil=True)
def coordinate(flat, stride, d, rows, pairs, kind, f, keep, out):  # type: ignore[no-untyped-def]
    """A coordinate-wise rule over rows `rows` into out (d,).

    pairs (c, 2): the sorting network, empty if the columns are sorted already. kind: MEDIAN; TRIMMED: mean of ranks
    f..n-f-1; NEAR_MEDIAN, NEAR_TRIMMED: mean of the `keep` values nearest the median, nearest the trimmed mean.
    """
    n = rows.size
    tile = TILE // 2
    one, half = flat.dtype.type(1), flat.dtype.type(0.5)
    zero = flat.dtype.type(0)
    buf = np.empty((n, tile), flat.dtype)
    centre = np.empty(tile, flat.dtype)
    acc = np.empty(tile, flat.dtype)
    for start in range(0, d, tile):
        width = min(tile, d - start)
        for i in range(n):
            row = flat[rows[i] * stride + start : rows[i] * stride + start + width]
            target = buf[i]
            for k in range(width):
                target[k] = row[k]
        for c in range(pairs.shape[0]):
            lo, hi = buf[pairs[c, 0]], buf[pairs[c, 1]]
            for k in range(width):
                a, b = lo[k], hi[k]
                lo[k] = a if a < b else b
                hi[k] = b if a < b else a
        if kind in (MEDIAN, NEAR_MEDIAN):
            lo, hi = buf[(n - 1) // 2], buf[n // 2]
            if n % 2 == 1:
                for k in range(width):
                    centre[k] = lo[k]
            else:
                for k in range(width):
                    centre[k] = half * lo[k] + half * hi[k]
        else:
            base = buf[f]
            for k in range(width):
                acc[k] = zero
            for i in range(f + 1, n - f):
                row = buf[i]
                for k in range(width):
                    acc[k] += row[k] - base[k]
            share = one / flat.dtype.type(n - 2 * f)
            for k in range(width):
                centre[k] = base[k] + acc[k] * share
        target = out[start : start + width]
        if kind in (MEDIAN, TRIMMED):
            for k in range(width):
                target[k] = centre[k]
            continue
        # The `keep` values nearest the centre are consecutive ranks s..s+keep-1, and moving the window up from s to s+1
        # pays while x_{s+keep} is nearer than x_s, which is monotone in s: each rank is in or out by two comparisons.
        for k in range(width):
            acc[k] = zero
        slack = n - keep
        for i in range(n):
            row = buf[i]
            above, below = buf[min(i + keep, n - 1)], buf[max(i - keep, 0)]
            for k in range(width):
                term = row[k] - centre[k]
                if i < slack and centre[k] - row[k] > above[k] - centre[k]:
                    term = zero
                if i >= keep and not (centre[k] - below[k] > row[k] - centre[k]):
                    term = zero
                acc[k] += term
        share = one / flat.dtype.type(keep)
        for k in range(width):
            target[k] = centre[k] + acc[k] * share


@njit(cache=True, nogil=True)
def weighted_coordinate(flat, stride, d, rows, weights, pairs, median, mass, out):  # type: ignore[no-untyped-def]
    """Weighted median, or weighted trimmed mean that removes weight `mass` from either end, fractionally.

    weights (n,) sum to one. Median: first value whose cumulative weight passes 1/2, mid-point when it equals 1/2.
    """
    n = rows.size
    tile = TILE // 2
    keys = np.empty((n, tile), flat.dtype)
    carried = np.empty((n, tile), np.float64)
    half = flat.dtype.type(0.5)
    for start in range(0, d, tile):
        width = min(tile, d - start)
        for i in range(n):
            row = flat[rows[i] * stride + start : rows[i] * stride + start + width]
            for k in range(width):
                keys[i, k] = row[k]
                carried[i, k] = weights[i]
        for c in range(pairs.shape[0]):
            lo, hi, wlo, whi = keys[pairs[c, 0]], keys[pairs[c, 1]], carried[pairs[c, 0]], carried[pairs[c, 1]]
            for k in range(width):
                if hi[k] < lo[k]:
                    lo[k], hi[k] = hi[k], lo[k]
                    wlo[k], whi[k] = whi[k], wlo[k]
        for k in range(width):
            total = 0.0
            if median:
                i = 0
                while i < n - 1 and total + carried[i, k] < 0.5 - 1e-12:
                    total += carried[i, k]
                    i += 1
                j = i
                if total + carried[i, k] <= 0.5 + 1e-12 and i < n - 1:
                    j = i + 1
                    while j < n - 1 and carried[j, k] == 0.0:
                        j += 1
                out[start + k] = keys[i, k] if i == j else half * keys[i, k] + half * keys[j, k]
            else:
                acc, kept, base = 0.0, 0.0, 0.0
                for i in range(n):
                    share = min(total + carried[i, k], 1.0 - mass) - max(total, mass)
                    total += carried[i, k]
                    if share > 1e-12:
                        if kept == 0.0:
                            base = np.float64(keys[i, k])
                        acc += share * (np.float64(keys[i, k]) - base)
                        kept += share
                out[start + k] = base + acc / kept
