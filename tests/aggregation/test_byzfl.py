"""Cross-check against byzfl 0.0.11 where its definition is the same: its outputs, recorded, on a fixed 11 x 7 input with f = 3.

The live comparison, on large inputs and every rule, is benchmarks/aggregation_vs_byzfl.py.
"""

from __future__ import annotations

import numpy as np
import pytest

from raysys.aggregation import make_rule

BYZFL = {
    "median": [0.36, 0.22, -0.26, -0.21, 0.41, -0.74, 0.21],
    "trimmed_mean": [0.384, 0.026, -0.336, -0.148, 0.504, -0.454, 0.312],
    "meamed": [0.285, 0.28625, -0.23375, -0.33, 0.1725, -0.53125, 0.18625],
    "krum": [1.32, 0.36, -1.21, -0.0, 0.66, -1.29, 0.4],
    "multi_krum": [0.35625, -0.2, -0.54375, -0.00375, 0.19375, -0.60625, 0.48625],
    "mda": [0.51875, -0.02375, -0.35125, -0.04125, 0.37, -0.90125, 0.42],
    "monna": [0.40625, -0.015, -0.3525, 0.035, 0.37125, -0.07, 0.73875],
    "geometric_median": [0.3435448, -0.0026873, -0.3634197, 0.0347921, 0.4661827, -0.3902606, 0.3274737],
    "centered_clipping(radius=1.5,iterations=2)": [
        0.2472986,
        -0.0128753,
        -0.2865733,
        0.0336435,
        0.3864202,
        -0.2577335,
        0.265121,
    ],
    "nnm+trimmed_mean": [0.38475, -0.05225, -0.31225, 0.045, 0.45775, -0.564, 0.337],
    "arc+nnm+median": [0.369868, -0.0314664, -0.3368197, -0.0335005, 0.3683679, -0.2939299, 0.4230297],
    "clipping(radius=2.0)+multi_krum": [0.5086283, -0.024888, -0.3441173, 0.0262648, 0.1991479, -0.3892225, 0.5403573],
}


@pytest.mark.parametrize("spec", BYZFL)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_byzfl_agrees(spec, dtype):
    x = np.round(np.random.default_rng(0).standard_normal((11, 7)), 2).astype(dtype)
    np.testing.assert_allclose(make_rule(spec, 11, 3)(x), BYZFL[spec], atol=2e-6)
