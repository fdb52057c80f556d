"""Images and video as multi-scale bits: a causal convolutional codec, trained on images, inflated to time (ERNIE 5.0 sec. 2.3).

    frames (B, T, C, H, W) -> latents (B, T', H/4, W/4, d) -> bits of K scales -> the accumulated code -> frames

Notable choices
- Inflation is nothing that happens: every kernel over time starts with zeros but for its last slice, which is the 2-D kernel, and
  images train that slice alone. So a fresh or image-trained codec treats the frames of a video one by one, and a video of one
  frame is an image, always (VideoAR).
- Everything over time is causal, and nothing is normalised over time: a clip may be encoded in chunks (`Past`).
- Each latent frame is quantised by itself. Statistics of latents lie in the quantiser's buffers and are moved between steps only.
- Losses: reconstruction, commitment, bit entropy. The paper's GAN, perceptual and semantic losses are left out: they pay at
  resolutions where a mean squared error blurs; no teacher network for them ships with the dependencies.
- With a time stride tau the first frame stands alone and every tau frames after it share a latent frame: T = 1 + tau (T' - 1).
"""

from __future__ import annotations

from typing import Any, Self

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from raysys.runtime.config import Config
from raysys.systems.ernie.tokenizers.bits import MultiScaleBits, pyramid

STRIDE = 4
"""Pixels per latent place, in each direction."""


class VisualSetting(Config):
    """The visual tokenizer and its training."""

    bits: int = Field(16, ge=1, le=62)
    """d, bits of a token."""
    width: int = Field(32, ge=4, le=1024)
    """Channels at half resolution; twice as many at a quarter."""
    time_stride: int = Field(1, ge=1, le=8)
    """tau: frames after the first that share a latent frame [P: 4]."""
    image_steps: int = Field(800, ge=0)
    """Steps on images."""
    video_steps: int = Field(300, ge=0)
    """Steps on videos and images, after those."""
    batch: int = Field(32, ge=1)
    """Pictures of a step, half of them frames of videos; in the second part that half is whole videos."""
    blocks: int = Field(2, ge=1)
    """Parts that a step is cut into: the number of training workers must divide it."""
    lr: float = Field(4e-3, gt=0)
    """Peak step size: warm-up over a twentieth of the steps, then down to nothing along a cosine."""
    commitment: float = Field(0.25, ge=0)
    """Weight of the distance of latents from their code."""
    entropy: float = Field(0.1, ge=0)
    """Weight of the loss that wants bits sure of themselves and evenly used."""
    observe_every: int = Field(4, ge=1)
    """Steps between looks at the latents' statistics."""


Past = dict[str, Tensor]
"""What a chunk needs of the frames before it: the last inputs of each convolution over time, by the convolution's name."""


class CausalConv(nn.Module):
    """A convolution over time, height and width that sees this frame and those before: (B, T, C, H, W) to (B, T, C', H', W')."""

    def __init__(self, inside: int, outside: int, side: int = 3, span: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.side, self.span, self.stride = side, span, stride
        plain = nn.Conv2d(inside, outside, side)
        self.now = nn.Parameter(plain.weight.detach().clone())  # the temporally last slice
        earlier = torch.zeros(span - 1, outside, inside, side, side)  # [j]: of the frame j + 1 ago
        self.before = nn.Parameter(earlier) if span > 1 else None
        self.bias = nn.Parameter(torch.zeros(outside))

    @property
    def kernel(self) -> Tensor:
        """(C', C, span, side, side), as a 3-D convolution has it."""
        earlier = () if self.before is None else self.before.flip(0)
        return torch.stack([*earlier, self.now], 2)

    def forward(self, x: Tensor, past: Tensor | None = None) -> Tensor:
        """`past` (B, span - 1, C, H, W) are the inputs before x, by default none (zeros)."""
        t = x.shape[1]
        y = self._each(x, self.now, self.bias)
        if past is not None:
            x = torch.cat([past, x], 1)
        before = x.shape[1] - t  # inputs known from before
        for j in range(1, self.span):
            missing = max(0, j - before)
            if missing < t and self.before is not None:
                seen = self._each(x[:, max(0, before - j) : before - j + t], self.before[j - 1], None)
                y = y + F.pad(seen, (0, 0, 0, 0, 0, 0, missing, 0))
        return y

    def _each(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = F.conv2d(x.flatten(0, 1), weight, bias, self.stride, self.side // 2)
        return y.view(*x.shape[:2], *y.shape[1:])


class VisualTokenizer(nn.Module):
    """The codec. Frames are (B, T, C, H, W) in [0, 1]; latents (B, T', H/4, W/4, d), normalised, are what is quantised.

    Args:
        channels: C, 1 or 3.
        height, width: H and W, multiples of 4.
    """

    center: Tensor
    spread: Tensor

    def __init__(self, setting: VisualSetting, channels: int = 1, height: int = 16, width: int = 16) -> None:
        super().__init__()
        if height % STRIDE or width % STRIDE or height < STRIDE or width < STRIDE:
            raise ValueError(f"a canvas has sides that are multiples of {STRIDE}, got {height} x {width}")
        self.setting, self.channels, self.height, self.width = setting, channels, height, width
        self.tau = setting.time_stride
        w, wide, span = setting.width, 2 * setting.width, max(2, setting.time_stride)
        self.quantiser = MultiScaleBits(pyramid(height // STRIDE, width // STRIDE), setting.bits)
        self.register_buffer("center", torch.zeros(()))
        self.register_buffer("spread", torch.ones(()))
        self.stem = CausalConv(4 * channels, w)
        self.fine = CausalConv(w, w)
        self.down = CausalConv(4 * w, wide, 1)
        self.coarse = CausalConv(wide, wide, 3, span)
        self.latent = CausalConv(wide, setting.bits, 1)
        self.open = CausalConv(setting.bits, wide, 3, 2)
        self.coarse_out = CausalConv(wide, wide)
        self.spread_out = nn.ModuleList(CausalConv(wide, wide, 1) for _ in range(self.tau - 1))
        self.up = CausalConv(wide, 4 * w, 1)
        self.fine_out = CausalConv(w, w)
        self.close = CausalConv(w, 4 * channels)
        for slot in self.spread_out:
            nn.init.zeros_(slot.now)  # type: ignore[arg-type]  # at first a latent frame stands for tau equal frames

    @property
    def scales(self) -> tuple[tuple[int, int], ...]:
        """(h_k, w_k) of the pyramid, coarse to fine."""
        return self.quantiser.scales

    @property
    def bits(self) -> int:
        """d, the width of latents."""
        return self.quantiser.width

    @property
    def feature_width(self) -> int:
        """C1, channels of `features`."""
        return self.setting.width

    @property
    def config(self) -> dict[str, Any]:
        """Plain values from which `of` builds the same module."""
        sizes = {"channels": self.channels, "height": self.height, "width": self.width}
        return {"setting": self.setting.model_dump(), **sizes}

    @classmethod
    def of(cls, config: dict[str, Any]) -> Self:
        return cls(VisualSetting.of(config["setting"]), config["channels"], config["height"], config["width"])

    def latent_frames(self, frames: int) -> int:
        """T' of T frames; ValueError if the time stride does not fit them."""
        if frames < 1 or (frames - 1) % self.tau:
            raise ValueError(f"frames: got {frames}; expected 1 more than a multiple of {self.tau}")
        return 1 + (frames - 1) // self.tau

    def features(self, frames: Tensor) -> Tensor:
        """What understanding reads: (B, T, H/2, W/2, C1), each frame by itself, before anything is quantised."""
        return self._fine(frames).movedim(2, -1)

    def encode(self, frames: Tensor) -> Tensor:
        """Latents (B, T', h, w, d) of frames (B, T, C, H, W), ready for the quantiser's `plan`."""
        return self.quantiser.normalise(self.raw(frames))

    def decode(self, acc: Tensor) -> Tensor:
        """Frames (B, T, C, H, W) in [0, 1] of accumulated codes (B, T', h, w, d)."""
        return self._decode(acc, None)[0].clamp(0, 1)

    def reconstruct(self, frames: Tensor) -> Tensor:
        """Frames as they come back from their bits."""
        return self.decode(self.quantiser.quantise(self.encode(frames)))

    def encode_chunk(self, frames: Tensor, past: Past | None = None) -> tuple[Tensor, Past]:
        """The next latents of a clip that comes in chunks, and what the chunk after it needs.

        The first chunk (past None) has 1 + m tau frames, later ones m tau; together they give what `encode` gives.
        """
        raw, kept = self._encode(frames, past)
        return self.quantiser.normalise(raw), kept

    def decode_chunk(self, acc: Tensor, past: Past | None = None) -> tuple[Tensor, Past]:
        """The next frames of a clip whose codes come in chunks: together what `decode` gives."""
        frames, kept = self._decode(acc, past)
        return frames.clamp(0, 1), kept

    def raw(self, frames: Tensor) -> Tensor:
        """Latents before normalisation (B, T', h, w, d)."""
        return self._encode(frames, None)[0]

    def loss(self, frames: Tensor) -> tuple[Tensor, dict[str, float]]:
        """The training loss (scalar) of frames and its parts.

        Latents are normalised by the batch here, so that gradients know of it; the kept statistics are those of `observe`.
        The entropy's bit probability is sigmoid(4 r / a) of a scale's residual r, after Infinity's sigmoid(4 r sqrt d) where
        a = 1 / sqrt d; of each scale, since a fine scale's bits may be fair while the coarse ones are not.
        """
        raw = self.raw(frames)
        flat = raw.flatten(0, -2)
        z = (raw - flat.mean(0)) * torch.rsqrt(flat.var(0, correction=0) + 1e-5)
        residuals, acc = self.quantiser.residuals(z)
        back = self._decode(z + (acc - z).detach(), None)[0]  # straight through
        reconstruction = ((back - frames) / self.spread).square().mean()
        commitment = (z - acc).square().mean()
        unsure = [
            torch.sigmoid(4 * r.flatten(0, -2) / a) for r, a in zip(residuals, self.quantiser.amplitude, strict=True)
        ]
        entropy = torch.stack([_entropy(p).mean() - _entropy(p.mean(0)).mean() for p in unsure]).mean()
        s = self.setting
        told = {
            "reconstruction": float(reconstruction.detach()),
            "commitment": float(commitment.detach()),
            "entropy": float(entropy.detach()),
        }
        return reconstruction + s.commitment * commitment + s.entropy * entropy, told

    def _fine(self, frames: Tensor) -> Tensor:
        expected = (self.channels, self.height, self.width)
        if frames.dim() != 5 or tuple(frames.shape[2:]) != expected:
            raise ValueError(f"frames: got {tuple(frames.shape)}; expected (B, T, {', '.join(map(str, expected))})")
        h = self.stem(F.pixel_unshuffle((frames - self.center) / self.spread, 2))
        return h + self.fine(F.gelu(h))

    def _encode(self, frames: Tensor, past: Past | None) -> tuple[Tensor, Past]:
        kept: Past = {}
        h = self.down(F.pixel_unshuffle(F.gelu(self._fine(frames)), 2))
        h = h + self._over_time("coarse", F.gelu(h), past, kept)
        if past is None:
            self.latent_frames(h.shape[1])
            h = h[:, :: self.tau]
        elif h.shape[1] % self.tau:
            raise ValueError(f"frames: got {h.shape[1]} in a later chunk; expected a multiple of {self.tau}")
        else:
            h = h[:, self.tau - 1 :: self.tau]
        return self.latent(F.gelu(h)).movedim(2, -1), kept

    def _decode(self, acc: Tensor, past: Past | None) -> tuple[Tensor, Past]:
        kept: Past = {}
        h = self._over_time("open", acc.movedim(-1, 2), past, kept)
        h = h + self.coarse_out(F.gelu(h))
        if self.tau > 1:
            slots = torch.stack([*(h + slot(F.gelu(h)) for slot in self.spread_out), h], 2)
            h = slots.flatten(1, 2)
            h = h[:, self.tau - 1 :] if past is None else h
        h = F.pixel_shuffle(self.up(F.gelu(h)), 2)
        h = h + self.fine_out(F.gelu(h))
        return F.pixel_shuffle(self.close(F.gelu(h)), 2) * self.spread + self.center, kept

    def _over_time(self, name: str, x: Tensor, past: Past | None, kept: Past) -> Tensor:
        """A convolution over time; what the next chunk needs of x goes to `kept`."""
        conv: CausalConv = getattr(self, name)
        before = None if past is None else past[name]
        whole = x if before is None else torch.cat([before, x], 1)
        kept[name] = F.pad(whole, (0, 0, 0, 0, 0, 0, max(0, conv.span - 1 - whole.shape[1]), 0))[:, 1 - conv.span :]
        return conv(x, before)


def _entropy(p: Tensor) -> Tensor:
    return -(p * torch.log(p + 1e-7) + (1 - p) * torch.log1p(1e-7 - p))
