"""Features of images and videos to be understood: CNN and ViT patches, merged by attention (Section 2.2 of the paper).

Shapes: S images or videos of T frames, (hp, wp) patches, C1 CNN and C pixel channels, D width, K patches merged into a token.

Notable choices
- Per token K adjacent patches of each path (4 of an image, 16 over 4 frames) are joined to 2 K, attend to each other, and are
  averaged: the paper's order of operations; sizes are ours.
- Each of the 2 K slots has a projection of its own: the mean would otherwise not know which patch was where, and with one
  projection and a vector for each slot the digits of the embedded data were not learned at all (ours).
- The CNN path is the visual tokenizer before its quantiser. The paper's ViT is pretrained and large; ours is a patch projection
  and one transformer layer, trained with the backbone (INFERRED small stand-in).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raysys.systems.ernie.stream import window

MOST = 16
"""K, patches of each path that are merged into a token at most."""


class SelfAttention(nn.Module):
    """Pre-norm attention of every token to every other: (n, t, D) -> (n, t, D), with the residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.out = nn.RMSNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        q, k, v = self.qkv(self.norm(x)).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v)
        y: Tensor = x + self.out(seen.transpose(1, 2).reshape(n, t, width))
        return y


class LookEncoder(nn.Module):
    """(cnn, pixels) to tokens (S, n, D), n = T / window(T) * hp / 2 * wp / 2."""

    def __init__(self, cnn: int, channels: int, width: int, heads: int) -> None:
        super().__init__()
        self.patch = nn.Linear(4 * channels, width)
        self.vit, self.merge = SelfAttention(width, heads), SelfAttention(width, heads)
        last = nn.Linear(2 * width, width)
        self.inner = nn.Sequential(nn.RMSNorm(width), nn.Linear(width, 2 * width), nn.GELU(), last)
        self.slot_cnn = nn.Parameter(torch.randn(MOST, cnn, width) * cnn**-0.5)
        self.slot_vit = nn.Parameter(torch.randn(MOST, width, width) * width**-0.5)
        self.frequencies: Tensor
        half = torch.arange(width // 4).float()
        self.register_buffer("frequencies", 100.0 ** (-half / max(1, width // 4)), persistent=False)
        self.place = nn.Linear(4 * len(half), width)
        self.norm, self.out = nn.RMSNorm(width), nn.Linear(width, width)
        for weight in (self.vit.out.weight, self.merge.out.weight, last.weight):
            nn.init.zeros_(weight)  # at first a token is a linear map of its patches

    def forward(self, cnn: Tensor, pixels: Tensor) -> Tensor:
        s, t, hp, wp, _ = cnn.shape
        c, w = pixels.shape[2], window(t)
        patches = pixels.view(s, t, c, hp, 2, wp, 2).permute(0, 1, 3, 5, 2, 4, 6).reshape(s, t, hp, wp, 4 * c)
        patches = self.patch(patches) + self._places(hp, wp)
        vit = self.vit(patches.reshape(s * t, hp * wp, -1))
        vit = (vit + self.inner(vit)).view(s, t, hp, wp, -1)
        first = torch.einsum("gkc,kcd->gkd", _adjacent(cnn, w), self.slot_cnn[: 4 * w])
        second = torch.einsum("gkc,kcd->gkd", _adjacent(vit, w), self.slot_vit[: 4 * w])
        groups = torch.cat([first, second], 1)  # (S n, 2 K, D)
        y: Tensor = self.out(self.norm(self.merge(groups).mean(1)))
        return y.view(s, -1, y.shape[-1])

    def _places(self, hp: int, wp: int) -> Tensor:
        """Learned projection of sines of row and column: (hp, wp, D)."""
        rows = torch.arange(hp, device=self.frequencies.device)[:, None] * self.frequencies
        columns = torch.arange(wp, device=self.frequencies.device)[:, None] * self.frequencies
        both = torch.cat(
            [
                torch.cat([rows.sin(), rows.cos()], -1)[:, None].expand(hp, wp, -1),
                torch.cat([columns.sin(), columns.cos()], -1)[None].expand(hp, wp, -1),
            ],
            -1,
        )
        y: Tensor = self.place(both)
        return y


def _adjacent(x: Tensor, w: int) -> Tensor:
    """Patches (S, T, hp, wp, D) in groups of w frames and 2 x 2 places: (S n, 4 w, D)."""
    s, t, hp, wp, d = x.shape
    cut = x.view(s, t // w, w, hp // 2, 2, wp // 2, 2, d)
    return cut.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(-1, 4 * w, d)
