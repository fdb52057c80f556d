"""The modified discrete cosine transform of a whole sound, orthogonal to its ends.

Shapes: a sound of n = N * hop samples, N frames of hop coefficients.

Notable choices
- Written as what it is: at each border between blocks the samples of both sides are rotated pairwise (window and folding in
  one), then each block gets a DCT-IV. Both steps are orthogonal, so the inverse is the transpose, the alias of one frame cancels
  against the next (TDAC), and an error in coefficients is the same error in samples (Parseval). It is the usual MDCT of the
  sound played backwards: even at the left border, odd at the right one.
- At the two ends nothing is rotated: windows with zero overlap. So n samples are exactly n coefficients.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Lapped(nn.Module):
    """MDCT with the sine window, which overlaps its neighbours by half a block on either side."""

    basis: Tensor
    angle: Tensor

    def __init__(self, hop: int) -> None:
        super().__init__()
        if hop < 2 or hop % 2:
            raise ValueError(f"a block has an even number of samples, got {hop}")
        self.hop = hop
        k = torch.arange(hop, dtype=torch.float64) + 0.5
        basis = math.sqrt(2 / hop) * torch.cos(math.pi / hop * k[:, None] * k[None])
        angle = math.pi / (2 * hop) * (hop / 2 + k[: hop // 2])  # sin of it: the window right of a border
        self.register_buffer("basis", basis.float(), persistent=False)
        self.register_buffer("angle", angle.float(), persistent=False)

    def forward(self, sound: Tensor) -> Tensor:
        """Coefficients (..., N, hop) of sounds (..., n)."""
        if sound.shape[-1] % self.hop or not sound.shape[-1]:
            raise ValueError(f"a sound has a multiple of {self.hop} samples, got {sound.shape[-1]}")
        blocks = sound.reshape(*sound.shape[:-1], -1, self.hop)
        return self._rotate(blocks, 1.0) @ self.basis

    def inverse(self, coefficients: Tensor) -> Tensor:
        """Sounds (..., n) of coefficients (..., N, hop)."""
        return self._rotate(coefficients @ self.basis, -1.0).flatten(-2)

    def _rotate(self, blocks: Tensor, way: float) -> Tensor:
        """Rotate sample i left of each border with sample i right of it; `way` -1 rotates back."""
        half = self.hop // 2
        before, after = (
            blocks[..., :-1, half:].flip(-1),
            blocks[..., 1:, :half],
        )  # (..., N - 1, half), nearest to the border first
        c, s = self.angle.sin().to(blocks), way * self.angle.cos().to(blocks)
        left, right = c * before - s * after, s * before + c * after
        first, last = blocks[..., :1, :half], blocks[..., -1:, half:]
        return torch.cat([torch.cat([first, right], -2), torch.cat([left.flip(-1), last], -2)], -1)
