"""Cross-check against byzfl where its definition is the same (it is not a dependency)."""

from __future__ import annotations

import numpy as np
import pytest

from raysys.aggregation import make_rule

byzfl = pytest.importorskip("byzfl", reason="byzfl is not installed here: an optional cross-check")

PAIRS = {
    "median": lambda f: byzfl.Median(),
    "trimmed_mean": lambda f: byzfl.TrMean(f),
    "meamed": lambda f: byzfl.Meamed(f),
    "krum": lambda f: byzfl.Krum(f),
    "multi_krum": lambda f: byzfl.MultiKrum(f),
    "mda": lambda f: byzfl.MDA(f),
    "monna": lambda f: byzfl.MoNNA(f),
    "geometric_median": lambda f: byzfl.GeometricMedian(nu=1e-9, T=500),
}


@pytest.mark.parametrize("spec", PAIRS)
def test_byzfl_agrees(spec):
    x = np.random.default_rng(0).standard_normal((11, 7)).astype(np.float32)
    np.testing.assert_allclose(make_rule(spec, 11, 3)(x), PAIRS[spec](3)(x.copy()), atol=1e-5)
