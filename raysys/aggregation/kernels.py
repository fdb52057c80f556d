"""Compiled passes over rows: inner products, norms, magnitudes (numba, CPU).

Shapes: a stack of n rows and d columns is a flat array and a stride: x[i, k] = flat[i * stride + k]; m = n + anchors
(origin, then the reference if there is one).

Notable choices
- Flat arrays, because the compiler must know that columns are adjacent also where a stack is a slice of a larger one.
- The Gram takes products in the input's precision, SUB columns at a time (a row out of range is scaled by a power of two:
  1e30 does not overflow, 1e-30 does not vanish), and adds those partial sums in float64. Only the lower triangle is
  computed, by a 4 x 3 tile of rows held in registers. No BLAS: the bits depend on neither its version nor its threads.
"""

from __future__ import annotations

import math

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

BLOCK = 8192
"""Columns per Gram block. Shards that are cut at multiples of BLOCK give the same bits as the uncut stack."""
SUB = 1024


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


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
def row_norms(flat, stride, d, norms):  # type: ignore[no-untyped-def]
    """norms[i] <- Euclidean norm of row i, in float64."""
    for i in range(norms.size):
        row = flat[i * stride : i * stride + d]
        total = 0.0
        for k in range(d):
            total += np.float64(row[k]) * np.float64(row[k])
        norms[i] = np.sqrt(total)
