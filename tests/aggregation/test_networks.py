"""Sorting networks sort, and pruned ones put the right values in the right places."""

from __future__ import annotations

import numpy as np
import pytest

from raysys.aggregation.networks import batcher, median_network, trimmed_network


def run(network, values):
    values = values.copy()
    for a, b in network:
        values[[a, b]] = np.minimum(values[a], values[b]), np.maximum(values[a], values[b])
    return values


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 12, 14])
def test_batchers_network_sorts_every_zero_one_input(n):
    # The zero-one principle (Knuth 5.3.4, theorem Z): then it sorts everything.
    inputs = (np.arange(2**n)[None] >> np.arange(n)[:, None]) & 1
    assert np.array_equal(run(batcher(n), inputs), np.sort(inputs, axis=0))


@pytest.mark.parametrize("n", [20, 33, 50, 100])
def test_batchers_network_sorts_random_input(n):
    inputs = np.random.default_rng(n).integers(0, 9, (n, 500))
    assert np.array_equal(run(batcher(n), inputs), np.sort(inputs, axis=0))


@pytest.mark.parametrize("n", [3, 4, 9, 12])
def test_median_network_places_the_middle(n):
    inputs = (np.arange(2**n)[None] >> np.arange(n)[:, None]) & 1
    out, want = run(median_network(n), inputs), np.sort(inputs, axis=0)
    middle = sorted({(n - 1) // 2, n // 2})  # two for even n, in any order: they are averaged
    assert np.array_equal(np.sort(out[middle], axis=0), want[middle])


@pytest.mark.parametrize(("n", "f"), [(5, 1), (9, 2), (12, 5), (12, 1)])
def test_trimmed_network_places_the_set_of_middle_values(n, f):
    inputs = (np.arange(2**n)[None] >> np.arange(n)[:, None]) & 1
    out, want = run(trimmed_network(n, f), inputs), np.sort(inputs, axis=0)
    assert np.array_equal(np.sort(out[f : n - f], axis=0), want[f : n - f])


def test_pruning_pays():
    assert len(median_network(20)) < 0.85 * len(batcher(20))
    assert len(trimmed_network(20, 1)) < 0.5 * len(batcher(20))
