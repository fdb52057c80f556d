"""Compiled loops over columns (numba, CPU).

Shapes: n rows, d columns, m = n + anchors (origin, then the reference if there is one), T columns in a tile.

Notable choices
- Every kernel but the Gram treats each column on its own with the same operations in the same order (no fused
  multiply-add, no reassociation), so cutting the columns into shards cannot change a bit of the result.
- Sorting networks run on tiles that fit the first-level cache; `x if x < y else y` compiles to one min instruction.
- Sums are taken around one of the summed values: equal inputs give that value back exactly, in any precision.
- The Gram takes products in the input's precision on SUB columns at a time, each row scaled by a power of two there
  (1e30 does not overflow, 1e-30 does not vanish), and adds those partial sums in float64. Only the lower triangle is
  computed, in register tiles of 4 x 3 rows.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

BLOCK = 8192
"""Columns per Gram block. Shards that are cut at multiples of BLOCK give the same bits as the uncut stack."""
SUB = 512
TILE = 256

MEDIAN, TRIMMED, NEAR_MEDIAN, NEAR_TRIMMED = 0, 1, 2, 3


@njit(cache=True, nogil=True)
def row_tops(bits, mask, tops):  # type: ignore[no-untyped-def]
    """tops[i] <- the largest magnitude in row i of `bits` (n, d), floats seen as integers; order is that of the floats."""
    for i in range(bits.shape[0]):
        top = mask ^ mask
        for k in range(bits.shape[1]):
            top = max(top, bits[i, k] & mask)
        tops[i] = top


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
def _products(y, count, scale, gram):  # type: ignore[no-untyped-def]
    """gram[i, j] += scale[i] * scale[j] * <y_i, y_j> for j <= i < count, from rows y (padded to 12 | rows, SUB)."""
    zero = y.dtype.type(0)
    for i in range(0, count, 4):
        for j in range(0, min(i + 4, count), 3):
            a0, a1, a2, a3 = y[i], y[i + 1], y[i + 2], y[i + 3]
            b0, b1, b2 = y[j], y[j + 1], y[j + 2]
            s00 = s01 = s02 = s10 = s11 = s12 = s20 = s21 = s22 = s30 = s31 = s32 = zero
            for k in range(SUB):
                p0, p1, p2 = b0[k], b1[k], b2[k]
                q = a0[k]
                s00 += q * p0
                s01 += q * p1
                s02 += q * p2
                q = a1[k]
                s10 += q * p0
                s11 += q * p1
                s12 += q * p2
                q = a2[k]
                s20 += q * p0
                s21 += q * p1
                s22 += q * p2
                q = a3[k]
                s30 += q * p0
                s31 += q * p1
                s32 += q * p2
            tile = (s00, s01, s02, s10, s11, s12, s20, s21, s22, s30, s31, s32)
            for r in range(min(4, count - i)):
                for c in range(min(3, count - j)):
                    gram[i + r, j + c] += scale[i + r] * scale[j + c] * np.float64(tile[3 * r + c])


@njit(cache=True, nogil=True)
def block_grams(x, centre, reference, finite, mask, shift, bias, grams):  # type: ignore[no-untyped-def]
    """grams[b] <- inner products of the rows, the origin and the reference, all minus `centre`, over block b.

    x (n, d); centre (d,); reference (d,) or (0,) for none; finite (blocks, n): rows to take as `centre` where False;
    mask, shift, bias: integer type's magnitude mask, mantissa bits and exponent bias; grams (blocks, m, m) float64.
    """
    n, d = x.shape
    m = grams.shape[1]
    y = np.zeros(((m + 11) // 12 * 12, SUB), x.dtype)
    bits = y.view(mask.dtype)
    scale = np.ones(y.shape[0])
    for b in range(grams.shape[0]):
        gram = grams[b]
        gram[:] = 0.0
        for start in range(b * BLOCK, min(d, (b + 1) * BLOCK), SUB):
            width = min(SUB, d - start)
            for i in range(m):
                row, out = bits[i], y[i]
                if i < n and not finite[b, i]:
                    out[:] = 0
                    continue
                if i < n:
                    for k in range(width):
                        out[k] = x[i, start + k] - centre[start + k]
                elif i == n:
                    for k in range(width):
                        out[k] = -centre[start + k]
                else:
                    for k in range(width):
                        out[k] = reference[start + k] - centre[start + k]
                for k in range(width, SUB):
                    out[k] = 0
                top = mask[0] ^ mask[0]
                for k in range(SUB):
                    top = max(top, row[k] & mask[0])
                exponent = (np.int64(top) >> shift) - bias
                scale[i] = math.ldexp(1.0, exponent)
                inverse = x.dtype.type(math.ldexp(1.0, min(-exponent, bias - 1)))
                if exponent > -bias:
                    for k in range(SUB):
                        out[k] = out[k] * inverse
                else:
                    scale[i] = 1.0
            _products(y, m, scale, gram)
        for i in range(m):
            for j in range(i):
                gram[j, i] = gram[i, j]


@njit(cache=True, nogil=True)
def combine(x, rows, weights, reference, bias, base, total, out):  # type: ignore[no-untyped-def]
    """out <- total * x[base] + sum_i weights[i] * (x[rows[i]] - x[base]) + bias * (reference - x[base]), in float64."""
    d = x.shape[1]
    acc = np.empty(TILE, np.float64)
    for start in range(0, d, TILE):
        width = min(TILE, d - start)
        anchor = x[base, start : start + width]
        for k in range(width):
            acc[k] = total * np.float64(anchor[k])
        i = 0
        while i + 4 <= rows.size:
            w0, w1, w2, w3 = weights[i], weights[i + 1], weights[i + 2], weights[i + 3]
            x0, x1 = x[rows[i], start : start + width], x[rows[i + 1], start : start + width]
            x2, x3 = x[rows[i + 2], start : start + width], x[rows[i + 3], start : start + width]
            for k in range(width):
                c = np.float64(anchor[k])
                acc[k] += (w0 * (np.float64(x0[k]) - c) + w1 * (np.float64(x1[k]) - c)) + (
                    w2 * (np.float64(x2[k]) - c) + w3 * (np.float64(x3[k]) - c)
                )
            i += 4
        while i < rows.size:
            w0, x0 = weights[i], x[rows[i], start : start + width]
            for k in range(width):
                acc[k] += w0 * (np.float64(x0[k]) - np.float64(anchor[k]))
            i += 1
        if bias != 0.0:
            for k in range(width):
                acc[k] += bias * (np.float64(reference[start + k]) - np.float64(anchor[k]))
        for k in range(width):
            out[start + k] = acc[k]


@njit(cache=True, nogil=True)
def mix(x, matrix, totals, base, reference, bias, out):  # type: ignore[no-untyped-def]
    """out[i] <- totals[i] * x[base] + sum_j matrix[i, j] * (x[j] - x[base]) + bias[i] * (reference - x[base]).

    x (n, d), matrix (k, n), totals (k,), bias (k,), out (k, d); zero entries of the matrix cost nothing.
    """
    n, d = x.shape
    k_rows = matrix.shape[0]
    y = np.empty((n, TILE), x.dtype)
    kind = x.dtype.type
    for start in range(0, d, TILE):
        width = min(TILE, d - start)
        anchor = x[base, start : start + width]
        for j in range(n):
            row = x[j, start : start + width]
            for k in range(width):
                y[j, k] = row[k] - anchor[k]
        for i in range(k_rows):
            target = out[i, start : start + width]
            t = kind(totals[i])
            for k in range(width):
                target[k] = t * anchor[k]
            j = 0
            while j < n:
                if matrix[i, j] == 0.0:
                    j += 1
                    continue
                j1 = j + 1
                while j1 < n and matrix[i, j1] == 0.0:
                    j1 += 1
                j2 = j1 + 1
                while j2 < n and matrix[i, j2] == 0.0:
                    j2 += 1
                j3 = j2 + 1
                while j3 < n and matrix[i, j3] == 0.0:
                    j3 += 1
                if j3 < n:
                    w0, w1, w2, w3 = (kind(matrix[i, j]), kind(matrix[i, j1]), kind(matrix[i, j2]), kind(matrix[i, j3]))
                    y0, y1, y2, y3 = y[j], y[j1], y[j2], y[j3]
                    for k in range(width):
                        target[k] += (w0 * y0[k] + w1 * y1[k]) + (w2 * y2[k] + w3 * y3[k])
                    j = j3 + 1
                else:
                    w0, y0 = kind(matrix[i, j]), y[j]
                    for k in range(width):
                        target[k] += w0 * y0[k]
                    j += 1
            if bias[i] != 0.0:
                t = kind(bias[i])
                for k in range(width):
                    target[k] += t * (reference[start + k] - anchor[k])


@njit(cache=True, nogil=True)
def coordinate(x, rows, pairs, kind, f, keep, out):  # type: ignore[no-untyped-def]
    """A coordinate-wise rule over rows `rows` of x (n, d) into out (d,).

    pairs (c, 2): the sorting network. kind: MEDIAN; TRIMMED: mean of ranks f..n-f-1; NEAR_MEDIAN, NEAR_TRIMMED: mean of
    the `keep` values nearest the median, nearest the trimmed mean.
    """
    n, d = rows.size, x.shape[1]
    one = x.dtype.type(1)
    half = x.dtype.type(0.5)
    buf = np.empty((n, TILE), x.dtype)
    centre = np.empty(TILE, x.dtype)
    acc = np.empty(TILE, x.dtype)
    for start in range(0, d, TILE):
        width = min(TILE, d - start)
        for i in range(n):
            row = x[rows[i], start : start + width]
            for k in range(width):
                buf[i, k] = row[k]
        for c in range(pairs.shape[0]):
            lo, hi = buf[pairs[c, 0]], buf[pairs[c, 1]]
            for k in range(width):
                a, b = lo[k], hi[k]
                lo[k] = a if a < b else b
                hi[k] = b if a < b else a
        target = out[start : start + width]
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
                acc[k] = 0
            for i in range(f + 1, n - f):
                row = buf[i]
                for k in range(width):
                    acc[k] += row[k] - base[k]
            share = one / x.dtype.type(n - 2 * f)
            for k in range(width):
                centre[k] = base[k] + acc[k] * share
        if kind in (MEDIAN, TRIMMED):
            for k in range(width):
                target[k] = centre[k]
            continue
        # The `keep` values nearest the centre are consecutive ranks s..s+keep-1, and moving the window up from s to s+1
        # pays while x_{s+keep} is nearer than x_s, which is monotone in s: each rank is in or out by two comparisons.
        for k in range(width):
            acc[k] = 0
        slack = n - keep
        for i in range(n):
            row = buf[i]
            above, below = buf[min(i + keep, n - 1)], buf[max(i - keep, 0)]
            for k in range(width):
                inside = True
                if i < slack:
                    inside = not (centre[k] - row[k] > above[k] - centre[k])
                if i >= keep:
                    inside = inside and (centre[k] - below[k] > row[k] - centre[k])
                acc[k] += row[k] - centre[k] if inside else x.dtype.type(0)
        share = one / x.dtype.type(keep)
        for k in range(width):
            target[k] = centre[k] + acc[k] * share


@njit(cache=True, nogil=True)
def weighted_coordinate(x, rows, weights, pairs, median, mass, out):  # type: ignore[no-untyped-def]
    """Weighted median, or weighted trimmed mean that removes weight `mass` from either end, fractionally.

    weights (n,) sum to one. Median: first value whose cumulative weight passes 1/2, mid-point when it equals 1/2.
    """
    n, d = rows.size, x.shape[1]
    keys = np.empty((n, TILE), x.dtype)
    carried = np.empty((n, TILE), np.float64)
    for start in range(0, d, TILE):
        width = min(TILE, d - start)
        for i in range(n):
            for k in range(width):
                keys[i, k] = x[rows[i], start + k]
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
                half = x.dtype.type(0.5)
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
