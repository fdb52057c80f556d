"""Coordinate-wise rules as straight-line vector code, generated for one n at a time (llvmlite, CPU).

Shapes: n rows given by address, W lanes (columns) at a time, out (d,).

Notable choices
- A sorting network of n values is unrolled over vector registers: no loop, no branch, two instructions a comparator. It
  runs at one to four times the time of reading the stack, and takes 0.02 s (n = 20) to 0.5 s (n = 100) to compile, so
  nothing is cached on disk: a network is compiled when a process has pushed enough columns through the plain kernel.
- The comparators are reordered so that values stay in registers (`networks.schedule`); the order of a dataflow graph does
  not change what it computes, and sums are taken in the plain kernel's order, so the bits are those of `columnwise.coordinate`.
- The largest magnitude met is returned, which tells whether all input was finite without a pass of its own.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from raysys.aggregation import networks

LARGEST = 256
"""Rows beyond which networks give way to sorting."""

_WORTH = 100_000
_LOCK = threading.Lock()
_ENGINES: list[Any] = []
_READY: dict[tuple, Callable[[int, int, int], int]] = {}
_SEEN: dict[tuple, int] = {}


def kernel(
    n: int, kind: str, f: int, keep: int, dtype: np.dtype, columns: int
) -> Callable[[int, int, int], int] | None:
    """The compiled kernel (addresses of rows, address of out, d >= lanes) -> largest magnitude bits, or None if not worth it.

    columns: how many this call will push; kernels are compiled once enough have been asked for.
    """
    key = (n, kind, f, keep, np.dtype(dtype).char)
    ready = _READY.get(key)
    if ready is not None:
        return ready
    if n > LARGEST:
        return None
    _SEEN[key] = _SEEN.get(key, 0) + columns
    if _SEEN[key] < _WORTH:
        return None
    with _LOCK:
        if key not in _READY:
            _READY[key] = _load(_emit(n, kind, f, keep, np.dtype(dtype)))
    return _READY[key]


def lanes(dtype: np.dtype) -> int:
    """Columns worked on at a time: the least d a kernel takes."""
    return _width() // np.dtype(dtype).itemsize


@cache
def _width() -> int:
    """Bytes of a vector register."""
    return 64 if llvm.get_host_cpu_features().get("avx512f") else 32


def _machine() -> Any:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = llvm.get_host_cpu_features().flatten()
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=features, opt=2
    )


def _load(source: str) -> Callable[[int, int, int], int]:
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(source), _machine())
    engine.finalize_object()
    _ENGINES.append(engine)
    void = ctypes.c_void_p
    return ctypes.CFUNCTYPE(ctypes.c_int64, void, void, ctypes.c_int64)(engine.get_function_address("kernel"))


def _emit(n: int, kind: str, f: int, keep: int, dtype: np.dtype) -> str:
    """The module's text: a loop over the columns, the last step overlapping the one before where d is no multiple of W."""
    module = ir.Module()
    module.triple = llvm.get_default_triple()
    module.data_layout = str(_machine().target_data)
    scalar = ir.FloatType() if dtype.itemsize == 4 else ir.DoubleType()
    count = _width() // dtype.itemsize
    word = ir.IntType(8 * dtype.itemsize)
    size, vector, bits = ir.IntType(64), ir.VectorType(scalar, count), ir.VectorType(word, count)
    function = ir.Function(
        module, ir.FunctionType(size, [scalar.as_pointer().as_pointer(), scalar.as_pointer(), size]), "kernel"
    )
    rows, out, d = function.args
    entry, loop, done = (function.append_basic_block(name) for name in ("entry", "loop", "done"))
    b = ir.IRBuilder(entry)
    last = b.sub(d, size(count))
    b.branch(loop)
    b.position_at_end(loop)
    k, top = b.phi(size), b.phi(bits)
    k.add_incoming(size(0), entry)
    top.add_incoming(ir.Constant(bits, [0] * count), entry)
    mask = ir.Constant(bits, [(1 << (8 * dtype.itemsize - 1)) - 1] * count)
    wires, most = [], top
    for i in range(n):
        address = b.gep(b.load(b.gep(rows, [size(i)])), [k])
        value = b.load(b.bitcast(address, vector.as_pointer()))
        value.align = dtype.itemsize
        magnitude = b.and_(b.bitcast(value, bits), mask)
        most = b.select(b.icmp_unsigned(">", magnitude, most), magnitude, most)
        wires.append(value)
    if kind == "median":
        network = networks.median_network(n)
    elif kind == "trimmed":
        network = networks.trimmed_network(n, f)
    else:
        network = networks.batcher(n)
    for low, high in networks.schedule(network, n):
        less = b.fcmp_ordered("<", wires[low], wires[high])
        wires[low], wires[high] = b.select(less, wires[low], wires[high]), b.select(less, wires[high], wires[low])
    result = _reduce(b, vector, wires, kind, f, keep)
    store = b.store(result, b.bitcast(b.gep(out, [k]), vector.as_pointer()))
    store.align = dtype.itemsize
    after = b.add(k, size(count))
    inside = b.icmp_signed("<=", after, last)
    following = b.select(inside, after, last)
    k.add_incoming(following, b.block)
    top.add_incoming(most, b.block)
    b.cbranch(b.icmp_signed("<", k, last), loop, done)
    b.position_at_end(done)
    peak = b.extract_element(most, ir.IntType(32)(0))
    for lane in range(1, count):
        other = b.extract_element(most, ir.IntType(32)(lane))
        peak = b.select(b.icmp_unsigned(">", other, peak), other, peak)
    b.ret(peak if dtype.itemsize == 8 else b.zext(peak, size))
    return str(module)


def _reduce(b: Any, vector: Any, x: list[Any], kind: str, f: int, keep: int) -> Any:
    """The output from the ordered values; the operations of `columnwise.coordinate`, in its order."""

    def splat(value: Any) -> Any:
        return ir.Constant(vector, [float(value)] * vector.count)

    n = len(x)
    real = np.float32 if vector.element == ir.FloatType() else np.float64
    if kind in ("median", "near_median"):
        low, high = x[(n - 1) // 2], x[n // 2]
        centre = low if n % 2 else b.fadd(b.fmul(splat(0.5), low), b.fmul(splat(0.5), high))
    else:
        total = splat(0.0)
        for i in range(f + 1, n - f):
            total = b.fadd(total, b.fsub(x[i], x[f]))
        centre = b.fadd(x[f], b.fmul(total, splat(real(1) / real(n - 2 * f))))
    if kind in ("median", "trimmed"):
        return centre
    total = splat(0.0)
    slack = n - keep
    moves = [b.fcmp_ordered(">", b.fsub(centre, x[s]), b.fsub(x[s + keep], centre)) for s in range(slack)]
    for i in range(n):
        term = b.fsub(x[i], centre)
        if i < slack:
            term = b.select(moves[i], splat(0.0), term)
        if i >= keep:
            term = b.select(moves[i - keep], term, splat(0.0))
        total = b.fadd(total, term)
    return b.fadd(centre, b.fmul(total, splat(real(1) / real(keep))))


def run(
    function: Callable[[int, int, int], int], flat: NDArray, stride: int, rows: NDArray[np.intp], out: NDArray
) -> int:
    """Call a kernel on rows of a flat stack (see `columns.Block`): the largest magnitude met, as bits."""
    addresses = flat.ctypes.data + rows * (stride * flat.itemsize)
    return function(addresses.ctypes.data, out.ctypes.data, out.size)
