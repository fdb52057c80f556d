"""Compiled loops over columns (numba, CPU).

Shapes: a stack of n rows and d columns is a flat array and a stride: x[i, k] = flat[i * stride + k]; m = n + anchors
(origin, then the reference if there is one).

Notable choices
- Flat arrays, because the compiler must know that columns are adjacent also where a stack is a slice of a larger one.
- Every kernel but the Gram treats each column on its own with the same operations in the same order (no fused
  multiply-add, no reassociation), so cutting the columns into shards cannot change a bit of the result.
- Sums are taken around one of the summed values: equal inputs give that value back exactly, in any precision.
- The Gram takes products in the input's precision, SUB columns at a time (a row out of range is scaled by a power of two:
  1e30 does not overflow, 1e-30 does not vanish), and adds those partial sums in float64. Only the lower triangle is computed,
  by a 4 x 3 tile of rows held in registers. No BLAS: the bits depend on neither its version nor its threads.
"""

from __future__ import annotations

import math

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.extending import intrinsic

BLOCK = 8192
"""Columns per Gram block. Shards that are cut at multiples of BLOCK give the same bits as the uncut stack."""
SUB = 1024
TILE = 512

MEDIAN, TRIMMED, NEAR_MEDIAN, NEAR_TRIMMED = 0, 1, 2, 3


@njit(cache=True, nogil=True)
def row_tops(bits, stride, start, stop, mask, tops):  # type: ignore[no-untyped-def]
    """tops[i] <- the largest magnitude in columns start..stop of row i, floats seen as integers (their order is the same)."""
    for i in range(tops.size):
        row = bits[i * stride + start : i * stride + stop]
        top = mask[0] ^ mask[0]
        for k in range(row.size):
            top = max(top, row[k] & mask[0])
        tops[i] = top


@intrinsic
def _tile(typing, y, i, j, out):  # type: ignore[no-untyped-def]
    """out[3 r + c] <- <y[i + r], y[j + c]> for r < 4, c < 3, over the SUB columns of the C-ordered array y."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        array = context.make_array(signature.args[0])(context, builder, args[0])
        target = context.make_array(signature.args[3])(context, builder, args[3])
        scalar = context.get_data_type(signature.args[0].dtype)
        lanes = 8 if isinstance(scalar, ir.FloatType) else 4
        vector, size = ir.VectorType(scalar, lanes), ir.IntType(64)
        name = f"llvm.fmuladd.v{lanes}f{256 // lanes}"
        fma = builder.module.globals.get(name) or ir.Function(
            builder.module, ir.FunctionType(vector, [vector] * 3), name
        )
        data = builder.bitcast(array.data, scalar.as_pointer())
        starts = [
            builder.gep(data, [builder.mul(builder.add(base, size(r)), size(SUB))])
            for base, rows in ((args[1], 4), (args[2], 3))
            for r in range(rows)
        ]
        before = builder.block
        loop, after = builder.append_basic_block("tile"), builder.append_basic_block("tile.end")
        builder.branch(loop)
        builder.position_at_end(loop)
        k = builder.phi(size)
        k.add_incoming(size(0), before)
        sums = [builder.phi(vector) for _ in range(12)]
        values = []
        for start in starts:
            value = builder.load(builder.bitcast(builder.gep(start, [k]), vector.as_pointer()))
            value.align = 8
            values.append(value)
        following = builder.add(k, size(lanes))
        for t, s in enumerate(sums):
            s.add_incoming(ir.Constant(vector, [0.0] * lanes), before)
            s.add_incoming(builder.call(fma, [values[t // 3], values[4 + t % 3], s]), loop)
        totals = [s.incomings[1][0] for s in sums]
        k.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", following, size(SUB)), loop, after)
        builder.position_at_end(after)
        pointer = builder.bitcast(target.data, scalar.as_pointer())
        for t, total in enumerate(totals):
            width = lanes
            while width > 1:  # add halves until one lane is left
                width //= 2
                undefined = ir.Constant(total.type, ir.Undefined)
                halves = [
                    builder.shuffle_vector(
                        total, undefined, ir.Constant(ir.VectorType(ir.IntType(32), width), list(range(a, a + width)))
                    )
                    for a in (0, width)
                ]
                total = builder.fadd(*halves)
            builder.store(builder.extract_element(total, ir.IntType(32)(0)), builder.gep(pointer, [size(t)]))
        return context.get_dummy_value()

    return types.void(y, types.int64, types.int64, out), codegen


@njit(cache=True, nogil=True)
def block_grams(flat, stride, n, d, centre, reference, finite, mask, shift, bias, grams):  # type: ignore[no-untyped-def]
    """grams[b] <- inner products of the rows, the origin and the reference, all minus `centre`, over block b.

    centre (d,); reference (d,) or (0,) for none; finite (blocks, n): rows that are False count as equal to `centre`, and
    are set to False where a value or its distance to the centre is not finite; mask, shift, bias: magnitude mask, mantissa
    bits and exponent bias of the float type; grams (blocks, m, m) float64.
    """
    m = grams.shape[1]
    y = np.zeros(((m + 11) // 12 * 12, SUB), flat.dtype)
    bits = y.view(mask.dtype)
    scale = np.ones(y.shape[0])
    tile = np.zeros(12, flat.dtype)
    limit = 2 * bias + 1
    for b in range(grams.shape[0]):
        gram = grams[b]
        gram[:] = 0.0
        for start in range(b * BLOCK, min(d, (b + 1) * BLOCK), SUB):
            width = min(SUB, d - start)
            mid = centre[start : start + width]
            for i in range(m):
                out, seen = y[i], bits[i]
                scale[i] = 1.0
                if i < n and not finite[b, i]:
                    out[:] = 0
                    continue
                if i < n:
                    row = flat[i * stride + start : i * stride + start + width]
                    for k in range(width):
                        out[k] = row[k] - mid[k]
                elif i == n:
                    for k in range(width):
                        out[k] = -mid[k]
                else:
                    ref = reference[start : start + width]
                    for k in range(width):
                        out[k] = ref[k] - mid[k]
                for k in range(width, SUB):
                    out[k] = 0
                top = mask[0] ^ mask[0]
                for k in range(SUB):
                    top = max(top, seen[k] & mask[0])
                exponent = np.int64(top) >> shift
                if exponent == limit:
                    if i < n:
                        finite[b, i] = False
                    out[:] = 0
                elif exponent != 0 and abs(exponent - bias) > bias // 4:
                    exponent = min(exponent - bias, bias - 1)
                    scale[i] = math.ldexp(1.0, exponent)
                    inverse = flat.dtype.type(math.ldexp(1.0, -exponent))
                    for k in range(SUB):
                        out[k] = out[k] * inverse
            for i in range(0, m, 4):
                for j in range(0, min(i + 4, m), 3):
                    _tile(y, i, j, tile)
                    for r in range(min(4, m - i)):
                        for c in range(min(3, m - j)):
                            gram[i + r, j + c] += scale[i + r] * scale[j + c] * np.float64(tile[3 * r + c])
        for i in range(m):
            for j in range(i):
                gram[j, i] = gram[i, j]


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
def block_norms(flat, stride, n, d, reference, grams):  # type: ignore[no-untyped-def]
    """The part of `block_grams` that norms and distances to the reference need, uncentred, with float64 products.

    grams (blocks, n + 1, n + 1), or (blocks, n + 2, n + 2) with a reference (d,): |x_i|^2, and <x_i, r>, |r|^2.
    """
    m = grams.shape[1]
    for b in range(grams.shape[0]):
        start, stop = b * BLOCK, min(d, (b + 1) * BLOCK)
        for i in range(n):
            row = flat[i * stride + start : i * stride + stop]
            total = 0.0
            for k in range(row.size):
                total += np.float64(row[k]) * np.float64(row[k])
            grams[b, i, i] = total
            if m == n + 2:
                ref = reference[start:stop]
                total = 0.0
                for k in range(row.size):
                    total += np.float64(row[k]) * np.float64(ref[k])
                grams[b, i, n + 1] = grams[b, n + 1, i] = total
        if m == n + 2:
            ref = reference[start:stop]
            total = 0.0
            for k in range(ref.size):
                total += np.float64(ref[k]) * np.float64(ref[k])
            grams[b, n + 1, n + 1] = total


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
    """out <- weight * sum_i x[rows[i]], in float64, for float32 rows: `combine` for equal weights, at the speed of memory."""
    tile = 2 * TILE
    acc = np.empty(tile, np.float64)
    for start in range(0, d, tile):
        width = min(tile, d - start)
        for k in range(width):
            acc[k] = 0.0
        i = 0
        while i + 8 <= rows.size:
            x0 = flat[rows[i + 0] * stride + start : rows[i + 0] * stride + start + width]
            x1 = flat[rows[i + 1] * stride + start : rows[i + 1] * stride + start + width]
            x2 = flat[rows[i + 2] * stride + start : rows[i + 2] * stride + start + width]
            x3 = flat[rows[i + 3] * stride + start : rows[i + 3] * stride + start + width]
            x4 = flat[rows[i + 4] * stride + start : rows[i + 4] * stride + start + width]
            x5 = flat[rows[i + 5] * stride + start : rows[i + 5] * stride + start + width]
            x6 = flat[rows[i + 6] * stride + start : rows[i + 6] * stride + start + width]
            x7 = flat[rows[i + 7] * stride + start : rows[i + 7] * stride + start + width]
            for k in range(width):
                acc[k] = (
                    acc[k]
                    + np.float64(x0[k])
                    + np.float64(x1[k])
                    + np.float64(x2[k])
                    + np.float64(x3[k])
                    + np.float64(x4[k])
                    + np.float64(x5[k])
                    + np.float64(x6[k])
                    + np.float64(x7[k])
                )
            i += 8
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


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
def row_norms(flat, stride, d, norms):  # type: ignore[no-untyped-def]
    """norms[i] <- Euclidean norm of row i, in float64."""
    for i in range(norms.size):
        row = flat[i * stride : i * stride + d]
        total = 0.0
        for k in range(d):
            total += np.float64(row[k]) * np.float64(row[k])
        norms[i] = np.sqrt(total)


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
