"""Attention with Uni-RoPE and a cache, and the layer of the backbone.

Shapes: R rows, T new places, S places that can be seen (cached and new), H heads of c numbers, D = H c.

Notable choices
- Uni-RoPE (Section 2.2): frequency i turns with coordinate i mod 3 of (time, height, width). With all three equal it is 1-D RoPE;
  how the paper splits the frequencies is not given (INFERRED).
- Queries and keys are normalised per head (as Chameleon found necessary for mixed modalities).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raysys.nn.moe import MoE


class Rotary(nn.Module):
    """Angles of positions (R, T, 3): cosines and sines (R, 1, T, c / 2)."""

    inverse: Tensor

    def __init__(self, head: int, base: float) -> None:
        super().__init__()
        self.register_buffer("inverse", base ** (-torch.arange(head // 2).float() / (head // 2)), persistent=False)

    def forward(self, position: Tensor) -> tuple[Tensor, Tensor]:
        axis = torch.arange(len(self.inverse), device=position.device) % 3
        angle = (position[..., axis] * self.inverse)[:, None]
        return angle.cos(), angle.sin()


def rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Turn x (R, H, T, c), pairs of number i and i + c / 2."""
    first, second = x.chunk(2, -1)
    cos, sin = (t.to(x.dtype) for t in turn)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class Cache:
    """Keys and values of places already computed, with room for more; all rows grow together, places may be empty (ragged)."""

    def __init__(
        self, layers: int, rows: int, heads: int, head: int, room: int, device: str, dtype: torch.dtype
    ) -> None:
        shape = (layers, rows, heads, room, head)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.valid = torch.zeros(rows, room, dtype=torch.bool, device=device)
        self.group = torch.zeros(rows, room, dtype=torch.int64, device=device)
        self.length = 0

    def extend(self, valid: Tensor, group: Tensor) -> Tensor:
        """Take in new places (R, T) and return what each of them sees, (R, T, S). A place sees itself, valid or not."""
        start, stop = self.length, self.length + valid.shape[1]
        if stop > self.valid.shape[1]:
            raise ValueError(f"the cache has room for {self.valid.shape[1]} places, got {stop}")
        self.valid[:, start:stop], self.group[:, start:stop] = valid, group
        self.length = stop
        seen = self.valid[:, None, :stop] & (self.group[:, None, :stop] <= group[:, :, None])
        own = torch.arange(start, stop, device=valid.device)[:, None] == torch.arange(stop, device=valid.device)
        return seen | own

    def put(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add the new places' keys and values (R, H, T, c) of a layer; returns all of them (R, H, S, c)."""
        start = self.length - key.shape[2]
        self.keys[layer, :, :, start : self.length] = key
        self.values[layer, :, :, start : self.length] = value
        return self.keys[layer, :, :, : self.length], self.values[layer, :, :, : self.length]

    def pick(self, rows: Tensor) -> None:
        """Keep these rows (in this order, repeats allowed)."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        self.valid, self.group = self.valid[rows], self.group[rows]


class Attention(nn.Module):
    """Self-attention over what `visible` allows."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.norm_q, self.norm_k = nn.RMSNorm(width // heads), nn.RMSNorm(width // heads)

    def forward(
        self, x: Tensor, turn: tuple[Tensor, Tensor], visible: Tensor, cache: Cache | None, layer: int
    ) -> Tensor:
        """x (R, T, D), visible (R, T, S): (R, T, D)."""
        r, t, width = x.shape
        qkv = self.qkv(x).view(r, t, 3 * self.heads, -1).transpose(1, 2)
        both, v = qkv[:, : 2 * self.heads], qkv[:, 2 * self.heads :]
        scale = torch.stack([self.norm_q.weight, self.norm_k.weight]).repeat_interleave(self.heads, 0)[:, None]
        q, k = rotate(F.rms_norm(both, both.shape[-1:]) * scale, turn).chunk(2, 1)  # both norms in one
        if cache is not None:
            k, v = cache.put(layer, k, v)
        seen = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, attn_mask=visible[:, None])
        y: Tensor = self.out(seen.transpose(1, 2).reshape(r, t, width))
        return y


class Layer(nn.Module):
    """x + Attention(norm x), then + MoE(norm x)."""

    def __init__(self, width: int, heads: int, moe: MoE) -> None:
        super().__init__()
        self.norm_attention, self.norm_moe = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention, self.moe = Attention(width, heads), moe
