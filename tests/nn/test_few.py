"""Experts for a few tokens: the same as for many."""

from __future__ import annotations

import pytest
import torch

from raysys.nn import experts, few


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "k"), [(0, 3), (1, 1), (1, 3), (2, 3), (9, 4), (16, 4)])
def test_few_rows_give_what_sorting_gives(rows: int, k: int, dtype: torch.dtype) -> None:
    """Largest difference seen: 2e-7 in float32, 3e-16 in float64."""
    generator = torch.Generator().manual_seed(rows * 10 + k)
    x, w_in, w_out, gates = (
        torch.randn(*shape, generator=generator).to(dtype) / 4
        for shape in ((rows, 12), (8, 12, 10), (8, 5, 12), (rows, k))
    )
    chosen = torch.rand(rows, 8, generator=generator).topk(k).indices
    for unused in (0.0, 0.4, 1.0):
        some = chosen.masked_fill(torch.rand(rows, k, generator=generator) < unused, -1)
        with torch.no_grad():
            assert few.applies(x, w_in, some)
            ours = few.mixture(x, w_in, w_out, some, gates)
            sorted_ones = experts.mixture(x, w_in, w_out, some, gates, "loop")
            taken = experts.mixture(x, w_in, w_out, some, gates)
        assert torch.allclose(ours, sorted_ones, atol=1e-6 if dtype == torch.float32 else 1e-14)
        assert torch.equal(taken, ours)
        assert ours.dtype == dtype


def test_it_is_left_alone_where_it_does_not_apply() -> None:
    x, w = torch.randn(2, 4), torch.randn(3, 4, 4)
    chosen = torch.zeros(2, 1, dtype=torch.int64)
    assert not few.applies(x, w, chosen), "gradients are wanted"
    with torch.no_grad():
        assert few.applies(x, w, chosen)
        assert not few.applies(x.to(torch.bfloat16), w, chosen)
        assert not few.applies(x, w, chosen.expand(2, few.MOST))
        with torch.autocast("cpu", torch.bfloat16):
            assert not few.applies(x, w, chosen)
