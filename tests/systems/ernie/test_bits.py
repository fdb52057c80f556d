"""The sign quantiser against its closed forms, and teacher forcing against what generation meets."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from raysys.systems.ernie.tokenizers.bits import MultiScaleBits, pyramid

SIZES = [(1, 1), (4, 4), (6, 4), (5, 3), (8, 8)]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fitted(height: int = 4, width: int = 4, bits: int = 16) -> tuple[MultiScaleBits, Tensor]:
    """A quantiser that has seen latents of correlated grids, and such latents (3, 2, h, w, d), normalised."""
    made = MultiScaleBits(pyramid(height, width), bits)
    raw = 3 * drawn(64, 1, 1, bits) + drawn(64, height, width, bits) + 0.5
    made.observe(raw)
    return made, made.normalise(raw[:6]).view(3, 2, height, width, bits)


def test_scales_double_up_to_the_grid() -> None:
    assert pyramid(4, 4) == ((1, 1), (2, 2), (4, 4))
    assert pyramid(6, 3) == ((1, 1), (2, 2), (4, 3), (6, 3))
    assert pyramid(1, 1) == ((1, 1),)


def test_error_of_one_scale_is_the_closed_form() -> None:
    """E(r - a sign r)^2 = E r^2 - (E|r|)^2 exactly, for whatever distribution: here a skewed one."""
    made = MultiScaleBits([(3, 5)], 7)
    raw = drawn(50, 3, 5, 7).double().exp()
    made.double().observe(raw)
    z = made.normalise(raw)
    made.amplitude[0] = z.abs().mean()
    error = (z - made.quantise(z)).square().mean()
    assert float(error) == pytest.approx(float(z.square().mean() - z.abs().mean() ** 2), rel=1e-12)


def test_a_gaussian_keeps_one_minus_two_over_pi() -> None:
    made = MultiScaleBits([(4, 4)], 16)
    made.observe(drawn(4000, 4, 4, 16))  # 1,024,000 numbers: standard error of the factor about 0.001
    z = made.normalise(drawn(4000, 4, 4, 16, seed=1))
    assert float((z - made.quantise(z)).square().mean()) == pytest.approx(1 - 2 / math.pi, abs=0.005)
    assert float(made.amplitude[0]) == pytest.approx(math.sqrt(2 / math.pi), abs=0.003)


def test_the_kept_amplitude_is_the_best_one() -> None:
    made, _ = fitted()
    raw = 3 * drawn(64, 1, 1, 16) + drawn(64, 4, 4, 16) + 0.5  # what it has observed
    z = made.normalise(raw)

    def error(factor: float) -> float:
        other = MultiScaleBits(made.scales, 16)
        other.load_state_dict(made.state_dict())
        other.amplitude[-1] *= factor
        return float((z - other.quantise(z)).square().mean())

    assert error(1.0) < min(error(0.98), error(1.02))


@pytest.mark.parametrize("size", SIZES)
def test_what_teacher_forcing_shows_is_what_generation_meets(size: tuple[int, int]) -> None:
    made, z = fitted(*size)
    plan, acc = made.plan(z), None
    for k, bits in enumerate(plan.bits):
        assert bits.shape == (3, 2, *made.scales[k], 16)
        acc = made.accumulate(acc, bits, k)
        following = min(k + 1, len(made.scales) - 1)
        assert torch.equal(plan.inputs[k], made.resized(acc, following))
    assert torch.equal(plan.inputs[-1], made.quantise(z))


@pytest.mark.parametrize("size", SIZES)
def test_grids_do_not_see_each_other(size: tuple[int, int]) -> None:
    made, z = fitted(*size)
    alone = made.plan(z[1, 1])
    together = made.plan(z)
    for one, all_ in zip(alone.bits + alone.inputs, together.bits + together.inputs, strict=True):
        assert torch.equal(one, all_[1, 1])


def test_flips_of_nothing_change_nothing_and_flips_of_all_invert() -> None:
    made, z = fitted()
    plan = made.plan(z)
    none = made.plan(z, torch.zeros(3, 2, 3), torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(plan.bits + plan.inputs, none.bits + none.inputs, strict=True))
    first = torch.zeros(3, 2, 3)
    first[..., 0] = 1
    inverted = made.plan(z, first, torch.Generator().manual_seed(0))
    assert torch.equal(inverted.bits[0], plan.bits[0])  # the target is never flipped
    assert torch.equal(inverted.inputs[0], -plan.inputs[0])


def test_targets_after_a_flip_are_those_of_what_is_left() -> None:
    made, z = fitted()
    flip = torch.zeros(3, 2, 3)
    flip[..., 0] = 0.5
    flipped = made.plan(z, flip, torch.Generator().manual_seed(3))
    acc = made.accumulate(None, made.resized(flipped.inputs[0], 0) > 0, 0)
    assert torch.equal(flipped.bits[1], made.resized(z - acc, 1) > 0)
    plain = made.plan(z)
    assert not torch.equal(flipped.bits[1], plain.bits[1])
    # the finer scales undo part of the damage: with the old targets the error would be larger
    stale = acc
    for k in (1, 2):
        stale = made.accumulate(stale, plain.bits[k], k)
    assert (z - flipped.inputs[-1]).square().mean() < (z - stale).square().mean()


def test_strength_is_the_share_of_flipped_bits() -> None:
    made = MultiScaleBits([(4, 4)], 16)
    z = drawn(2000, 4, 4, 16)
    for strength in (0.05, 0.3):
        plan = made.plan(z, torch.full((2000, 1), strength), torch.Generator().manual_seed(1))
        share = ((plan.inputs[0] > 0) != plan.bits[0]).double().mean()
        assert float(share) == pytest.approx(strength, abs=0.004)  # 512,000 draws: standard error below 0.0007


def test_repeating_then_averaging_is_the_identity() -> None:
    made, z = fitted(8, 4)
    for k in range(len(made.scales)):
        bits = made.resized(z, k) > 0
        back = made.resized(made.accumulate(None, bits, k), k)
        assert torch.allclose(back, made.amplitude[k] * (2.0 * bits - 1.0), rtol=1e-6)


def test_statistics_are_averages_and_then_follow() -> None:
    made = MultiScaleBits([(2, 2)], 3, momentum=0.5)
    parts = [drawn(10, 2, 2, 3, seed=s) + s for s in range(2)]
    for part in parts:
        made.observe(part)
    assert torch.allclose(made.mean, torch.stack([p.reshape(-1, 3).mean(0) for p in parts]).mean(0), atol=1e-6)
    before = made.mean.clone()
    made.observe(torch.full((10, 2, 2, 3), 9.0))
    assert torch.allclose(made.mean, (before + 9) / 2)


def test_entropy_is_one_for_fair_bits_and_zero_for_constant_ones() -> None:
    made = MultiScaleBits([(2, 2)], 4)
    assert made.entropy(drawn(4000, 2, 2, 4))[0] == pytest.approx(1, abs=1e-3)
    assert made.entropy(torch.ones(10, 2, 2, 4)) == [0.0]


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda m: m.plan(torch.zeros(2, 4, 4, 3)), "expected"),
        (lambda m: m.plan(torch.zeros(2, 4, 4, 16), torch.zeros(2, 2)), "flip"),
        (lambda m: m.plan(torch.zeros(2, 4, 4, 16), torch.zeros(2, 3)), "generator"),
        (lambda m: MultiScaleBits([(2, 2), (1, 1)], 4), "grow"),
        (lambda m: MultiScaleBits([(2, 2)], 63), "bits"),
        (lambda m: pyramid(0, 4), "at least 1"),
    ],
)
def test_wrong_shapes_are_refused(call: object, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        call(MultiScaleBits(pyramid(4, 4), 16))  # type: ignore[operator]
