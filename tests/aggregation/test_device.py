"""The torch path of CUDA tensors: its functions agree with the CPU kernels, here on the CPU, and on a GPU where there is one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from raysys.aggregation import BLOCK, columns, device, make_rule, survey
from raysys.aggregation.columns import Coordinatewise

RULES = [
    Coordinatewise("median"), Coordinatewise("trimmed", f=3), Coordinatewise("near_median", keep=9),
    Coordinatewise("near_trimmed", f=3, keep=9), Coordinatewise("near_median", keep=3),
    Coordinatewise("median", weights=np.arange(1.0, 13.0) / 78),
    Coordinatewise("trimmed", weights=np.arange(1.0, 13.0) / 78, mass=0.2),
    Coordinatewise("median", weights=np.full(12, 1 / 12)),
]  # fmt: skip


def stack(dtype=torch.float32, d=2 * BLOCK + 77):
    return torch.from_numpy(np.random.default_rng(0).standard_normal((12, d))).to(dtype)


@pytest.mark.parametrize("reference", [False, True])
def test_torch_survey_has_the_distances_of_the_compiled_one(reference):
    x, ref = stack(), stack(d=2 * BLOCK + 77)[3] if reference else None
    x[4, 9] = float("nan")
    x[5] *= 1e20
    ours, theirs = survey(x, ref), device.survey(x, ref, products=True)
    assert np.array_equal(ours.finite, theirs.finite)
    assert theirs.grams.shape == ours.grams.shape
    keep = np.flatnonzero(ours.finite)
    for a, b in ((ours.restrict(keep).gram, theirs.restrict(keep).gram),):
        distance = [np.diag(g)[:, None] + np.diag(g) - 2 * g for g in (a, b)]
        np.testing.assert_allclose(distance[0], distance[1], rtol=1e-5, atol=1e-5)
    assert np.array_equal(device.survey(x, ref, products=False).finite, ours.finite)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_torch_coordinate_rules_agree_with_the_kernels(rule, dtype):
    x = stack(dtype)
    want, _ = columns.coordinate(x, rule)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-6
    got = device.coordinate(x, rule, np.arange(12))
    assert got.dtype == dtype
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def test_torch_combinations_agree_with_the_kernels():
    x, ref = stack(), stack()[0]
    rng = np.random.default_rng(1)
    matrix = np.hstack([rng.random((5, 12)), np.zeros((5, 1)), rng.random((5, 1))])
    torch.testing.assert_close(device.mix(x, matrix, 2, ref), columns.mix(x, matrix, 2, ref), rtol=1e-5, atol=1e-5)
    weights = rng.random(12)
    torch.testing.assert_close(device.combine(x, weights, ref, 0.5), columns.combine(x, weights, ref, 0.5))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(
    "spec", ["mean", "median", "krum", "geometric_median", "nnm+trimmed_mean", "arc+nnm+caf", "bucketing+meamed"]
)
def test_rules_on_the_gpu_give_the_numbers_of_the_cpu(spec):
    x = stack()
    rule = make_rule(spec, 12, 2)
    out = rule(x.cuda())
    assert out.is_cuda
    torch.testing.assert_close(out.cpu(), rule(x), rtol=1e-4, atol=1e-5)
