"""The generated vector code gives the bits of the plain kernel, and finds values that are not finite."""

from __future__ import annotations

import numpy as np
import pytest

from raysys.aggregation import compiled
from raysys.aggregation.columns import KINDS, Block, _pairs, float_bits
from raysys.aggregation.columnwise import coordinate
from raysys.aggregation.networks import batcher, median_network, schedule


def both(n, kind, f, keep, dtype, d=101, x=None):
    x = np.random.default_rng(n).standard_normal((n, d)).astype(dtype) if x is None else x
    x[:, :7] = np.round(x[:, :7])  # ties
    flat = Block(x.reshape(-1), d, n, d)
    rows = np.random.default_rng(1).permutation(n)
    plain, fast = np.empty(d, dtype), np.empty(d, dtype)
    coordinate(flat.flat, d, d, rows, _pairs(n, kind, f), KINDS[kind], f, keep, plain)
    function = compiled.kernel(n, kind, f, keep, np.dtype(dtype), 10**9)
    top = compiled.run(function, flat.flat, d, rows, fast)
    return plain, fast, top


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("kind", "n", "f", "keep"),
    [
        ("median", 1, 0, 0), ("median", 20, 0, 0), ("median", 21, 0, 0), ("trimmed", 20, 4, 0), ("trimmed", 5, 2, 0),
        ("trimmed", 9, 0, 0), ("near_median", 20, 0, 16), ("near_median", 12, 0, 4), ("near_trimmed", 11, 3, 8),
        ("near_median", 7, 0, 7), ("median", 60, 0, 0),
    ],
)  # fmt: skip
def test_generated_code_gives_the_bits_of_the_plain_kernel(kind, n, f, keep, dtype):
    plain, fast, top = both(n, kind, f, keep, dtype)
    assert np.array_equal(plain, fast)
    assert top < float_bits(np.dtype(dtype)).infinity


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [(0, 0), (3, 50), (8, 100)])
def test_generated_code_reports_values_that_are_not_finite(bad, place):
    x = np.random.default_rng(0).standard_normal((9, 101)).astype(np.float32)
    x[place] = bad
    assert both(9, "median", 0, 0, np.float32, x=x)[2] >= float_bits(np.dtype(np.float32)).infinity


def test_kernels_are_compiled_only_when_enough_columns_ask():
    assert compiled.kernel(17, "trimmed", 3, 0, np.dtype(np.float32), 10) is None
    assert compiled.kernel(17, "trimmed", 3, 0, np.dtype(np.float32), 10**6) is not None
    assert compiled.kernel(17, "trimmed", 3, 0, np.dtype(np.float32), 10) is not None
    assert compiled.kernel(compiled.LARGEST + 1, "median", 0, 0, np.dtype(np.float32), 10**9) is None


@pytest.mark.parametrize("n", [7, 20, 50])
def test_scheduling_only_reorders_independent_comparators(n):
    for network in (batcher(n), median_network(n)):
        order = schedule(network, n)
        assert sorted(order) == sorted(network)
        for wire in range(n):
            assert [c for c in order if wire in c] == [c for c in network if wire in c]
