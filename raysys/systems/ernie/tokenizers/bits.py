"""Multi-scale residual bits: a grid of vectors as signs on a pyramid of scales, coarse first (ERNIE 5.0 sec. 2.3, from Infinity).

    acc = 0;  for scale k:  r = z - acc;  bits_k = down_k(r) > 0;  acc += up(a_k (2 bits_k - 1))

Shapes: any leading dimensions (batch, frames) of grids (h, w, d); scale k of K is (h_k, w_k, d), the last one (h, w, d).

Notable choices
- The amplitude of a scale is a_k = E|r_k|, an average kept over training: the least-squares step of a sign quantiser, since
  E(r - a sign r)^2 = E r^2 - 2 a E|r| + a^2. Infinity has 1/sqrt(d) on the unit sphere, one step for all scales (INFERRED:
  the paper gives none; with the fixed step the coarse scales hardly carried information in the prototype).
- down is the mean over areas and up repeats: down(up(q)) = q where the sizes divide, so a scale's residual is what that scale
  can still explain and nothing that a finer scale has to undo.
- Self-correction: flipped bits go into the accumulated code, and the targets of the finer scales are those of the residual
  that is left after the flip. Targets themselves are never flipped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MOST_BITS = 62
"""Bits of a token that one int64 index can hold."""


class Plan(NamedTuple):
    """What teacher forcing needs of grids: `bits[k]` (..., h_k, w_k, d) bool to be predicted, `inputs[k]` seen after scale k.

    `inputs[k]` for k < K - 1 is the accumulated code of the scales up to k, resized to scale k + 1; `inputs[K - 1]` is the whole
    accumulated code (..., h, w, d). Inputs have the flips in them, bits are the right answers given these inputs.
    """

    bits: list[Tensor]
    inputs: list[Tensor]


def pyramid(height: int, width: int) -> tuple[tuple[int, int], ...]:
    """Scales 1, 2, 4, ... up to (height, width): (4, 4) gives ((1, 1), (2, 2), (4, 4)), (6, 4) ends in (4, 4), (6, 4)."""
    if height < 1 or width < 1:
        raise ValueError(f"a grid needs a height and a width of at least 1, got {height} x {width}")
    steps = math.ceil(math.log2(max(height, width)))
    return tuple((min(2**k, height), min(2**k, width)) for k in range(steps + 1))


class MultiScaleBits(nn.Module):
    """The quantiser. Its buffers are the mean and variance of latents by channel (d,) and the amplitudes (K,); none is trained.

    Args:
        scales: (h_k, w_k) from coarse to fine; the last is the grid's size.
        width: d, the bits of a token.
        momentum: how slowly the averages follow `observe`.
    """

    mean: Tensor
    variance: Tensor
    amplitude: Tensor
    seen: Tensor

    def __init__(self, scales: Sequence[tuple[int, int]], width: int, momentum: float = 0.98) -> None:
        super().__init__()
        self.scales, self.width, self.momentum = tuple((int(h), int(w)) for h, w in scales), width, momentum
        if not self.scales or not 1 <= width <= MOST_BITS:
            raise ValueError(f"expected at least one scale and 1 to {MOST_BITS} bits, got {scales} and {width}")
        for (h, w), (taller, wider) in zip(self.scales, self.scales[1:], strict=False):
            if h > taller or w > wider or (h, w) == (taller, wider):
                raise ValueError(f"scales must grow, got {self.scales}")
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(width))
        self.register_buffer("amplitude", torch.ones(len(self.scales)))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of the finest scale."""
        return self.scales[-1]

    @property
    def tokens(self) -> int:
        """Tokens of a grid over all scales."""
        return sum(h * w for h, w in self.scales)

    def normalise(self, raw: Tensor) -> Tensor:
        """Latents (..., d) with the kept mean and variance of each channel taken out (batch normalisation without affine)."""
        return (raw - self.mean) * torch.rsqrt(self.variance + 1e-5)

    @torch.no_grad()
    def observe(self, raw: Tensor) -> None:
        """Let mean, variance and amplitudes follow raw latents (..., h, w, d): their average over calls, later a moving one.

        The first calls are averaged evenly, so nothing has to be guessed to begin with.
        """
        self._check(raw)
        rate = max(1.0 / (int(self.seen) + 1), 1.0 - self.momentum)
        flat = raw.to(self.mean.dtype).reshape(-1, self.width)
        self.mean.lerp_(flat.mean(0), rate)
        self.variance.lerp_(flat.var(0, correction=0), rate)
        z, acc = self.normalise(raw.to(self.mean.dtype)), None
        for k in range(len(self.scales)):
            residual = self._residual(z, acc, k)
            self.amplitude[k].lerp_(residual.abs().mean(), rate)
            acc = self.accumulate(acc, residual > 0, k)
        self.seen += 1

    def plan(self, z: Tensor, flip: Tensor | None = None, generator: torch.Generator | None = None) -> Plan:
        """Targets and inputs of grids `z` (..., h, w, d), normalised.

        Args:
            flip: (..., K) in [0, 1], how likely a bit of each scale is flipped before it enters the accumulated code.
            generator: draws the flips; a CPU generator.

        Raises:
            ValueError: z or flip has another shape than this quantiser's, or flips are asked for without a generator.
        """
        self._check(z)
        if flip is not None and flip.shape != (*z.shape[:-3], len(self.scales)):
            raise ValueError(f"flip: got {tuple(flip.shape)}; expected {(*z.shape[:-3], len(self.scales))}")
        if flip is not None and generator is None:
            raise ValueError("flip: needs a generator, so that the flips are a function of the seed")
        found, inputs, acc = [], [], None
        for k in range(len(self.scales)):
            bits = self._residual(z, acc, k) > 0
            found.append(bits)
            if flip is not None:
                drawn = torch.rand(bits.shape, generator=generator).to(z.device)
                bits = bits ^ (drawn < flip[..., k, None, None, None])
            acc = self.accumulate(acc, bits, k)
            inputs.append(self.resized(acc, min(k + 1, len(self.scales) - 1)))
        return Plan(found, inputs)

    def quantise(self, z: Tensor) -> Tensor:
        """The whole accumulated code (..., h, w, d) of normalised grids `z`, without flips."""
        return self.plan(z).inputs[-1]

    def residuals(self, z: Tensor) -> tuple[list[Tensor], Tensor]:
        """What each scale of normalised grids `z` quantises (..., h_k, w_k, d), with gradients, and the whole code, without."""
        found, acc = [], None
        for k in range(len(self.scales)):
            found.append(self._residual(z, acc, k))
            acc = self.accumulate(acc, found[-1].detach() > 0, k)
        assert acc is not None
        return found, acc

    def accumulate(self, acc: Tensor | None, bits: Tensor, k: int) -> Tensor:
        """The accumulated code (..., h, w, d) after scale k, whose bits are (..., h_k, w_k, d); None is nothing so far."""
        code = _up(self.amplitude[k] * (2.0 * bits - 1.0), self.grid)
        return code if acc is None else acc + code

    def resized(self, acc: Tensor, k: int) -> Tensor:
        """An accumulated code (..., h, w, d) at the size of scale k: (..., h_k, w_k, d), the mean over areas."""
        return _down(acc, self.scales[k])

    def entropy(self, z: Tensor) -> list[float]:
        """For each scale the mean entropy of a bit, in bits (1 is best), over normalised grids `z` (..., h, w, d)."""
        told = []
        for bits in self.plan(z).bits:
            p = bits.reshape(-1, self.width).double().mean(0)
            told.append(float((torch.special.entr(p) + torch.special.entr(1 - p)).mean() / math.log(2)))
        return told

    def _residual(self, z: Tensor, acc: Tensor | None, k: int) -> Tensor:
        return _down(z if acc is None else z - acc, self.scales[k])

    def _check(self, z: Tensor) -> None:
        expected = (*self.grid, self.width)
        if z.dim() < 3 or tuple(z.shape[-3:]) != expected:
            raise ValueError(f"latents: got {tuple(z.shape)}; expected (..., {', '.join(map(str, expected))})")


def _down(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Means over areas of grids (..., h, w, d): (..., *size, d)."""
    *lead, h, w, d = x.shape
    if (h, w) == size:
        return x
    if h % size[0] == 0 and w % size[1] == 0:
        return x.reshape(*lead, size[0], h // size[0], size[1], w // size[1], d).mean((-4, -2))
    flat = F.interpolate(x.reshape(-1, h, w, d).permute(0, 3, 1, 2), size=size, mode="area")
    return flat.permute(0, 2, 3, 1).reshape(*lead, *size, d)


def _up(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Grids (..., h, w, d) repeated to (..., *size, d)."""
    h, w = x.shape[-3:-1]
    if (h, w) == size:
        return x
    rows = torch.arange(size[0], device=x.device) * h // size[0]
    columns = torch.arange(size[1], device=x.device) * w // size[1]
    return x[..., rows, :, :][..., columns, :]
