"""Sound as residual codes of lapped-transform frames, the first code semantic (ERNIE 5.0 sec. 2.4; Mimi's idea of it).

    wave (B, n) -> MDCT frames (B, n / hop, hop) -> latents (B, n / hop, D) -> codes (B, n / hop, Q) -> wave

Notable choices
- The network sits between an MDCT and its inverse, which are exact: what is lost is lost by the codes alone, and a mean squared
  error of coefficients is one of samples.
- The first level is pulled towards meaning: from its vector alone the frame's pooled log-spectrum must be read off. The paper
  aligns it to pooled Whisper features; no speech model ships with the dependencies, so the spectrum stands in (ours).
- The other levels hold what is left of the same latent (plain RVQ; Mimi quantises the whole latent again).
- Codebooks and scales are buffers that change between steps only. No adversarial loss.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from raysys.runtime.config import Config
from raysys.systems.ernie.tokenizers.lapped import Lapped
from raysys.systems.ernie.tokenizers.residual import ResidualQuantiser

FLOOR = 0.02
"""Added to magnitudes, in units of the data's deviation, before their logarithm is taken: what lies 34 dB below is silence."""


class AudioSetting(Config):
    """The audio tokenizer and its training."""

    rate: int = Field(4000, ge=1000, le=48_000)
    """Samples per second."""
    hop: int = Field(128, ge=16, le=4096, multiple_of=2)
    """Samples of a frame [P: 12.5 frames per second]."""
    levels: int = Field(4, ge=1, le=32)
    """Q, codes of a frame; the first is the semantic one."""
    codes: int = Field(64, ge=2, le=65_536)
    """Vectors of a codebook."""
    width: int = Field(128, ge=8, le=4096)
    """Channels inside."""
    latent: int = Field(16, ge=1, le=1024)
    """D, width of what is quantised."""
    bands: int = Field(16, ge=2, le=256)
    """Bands of the pooled log-spectrum that the first level is aligned to."""
    steps: int = Field(600, ge=1)
    """Optimizer steps."""
    batch: int = Field(16, ge=1)
    """Sounds of a step."""
    blocks: int = Field(2, ge=1)
    """Parts that a step is cut into: the number of training workers must divide it."""
    lr: float = Field(4e-3, gt=0)
    """Peak step size: warm-up over a twentieth of the steps, then down to nothing along a cosine."""
    commitment: float = Field(0.1, ge=0)
    """Weight of the distance of latents from their codes."""
    semantic: float = Field(0.2, ge=0)
    """Weight of reading the log-spectrum off the first level."""
    spectral: float = Field(0.2, ge=0)
    """Weight of the log-magnitudes' error."""


class AudioCodec(nn.Module):
    """The codec. Waves (B, n) lie in [-1, 1]; n is a multiple of the hop."""

    scale: Tensor
    center: Tensor
    spread: Tensor
    window: Tensor
    pool: Tensor

    def __init__(self, setting: AudioSetting) -> None:
        super().__init__()
        self.setting, s = setting, setting
        self.lapped = Lapped(s.hop)
        self.quantiser = ResidualQuantiser(s.levels, s.codes, s.latent)
        self.register_buffer("scale", torch.ones(()))  # of coefficients
        self.register_buffer("center", torch.zeros(s.bands))  # of the pooled log-spectrum
        self.register_buffer("spread", torch.ones(s.bands))
        self.register_buffer("window", torch.hann_window(2 * s.hop), persistent=False)
        self.register_buffer("pool", _bands(s.bands, s.hop + 1), persistent=False)
        self.enter = nn.Conv1d(s.hop, s.width, 3, padding=1)
        self.inner = nn.Conv1d(s.width, s.width, 3, padding=1)
        self.to_latent = nn.Conv1d(s.width, s.latent, 1)
        self.from_latent = nn.Conv1d(s.latent, s.width, 3, padding=1)
        self.outer = nn.Conv1d(s.width, s.width, 3, padding=1)
        self.leave = nn.Conv1d(s.width, s.hop, 1)
        self.meaning = nn.Linear(s.latent, s.bands)

    @property
    def levels(self) -> int:
        """Q."""
        return self.setting.levels

    @property
    def codes(self) -> int:
        """Vectors of a codebook."""
        return self.setting.codes

    @property
    def config(self) -> dict[str, Any]:
        """Plain values from which `of` builds the same module."""
        return {"setting": self.setting.model_dump()}

    @classmethod
    def of(cls, config: dict[str, Any]) -> Self:
        return cls(AudioSetting.of(config["setting"]))

    def encode(self, wave: Tensor) -> Tensor:
        """Codes (B, n / hop, Q) int64 of waves (B, n)."""
        return self.quantiser.encode(self.latents(wave))

    def decode(self, codes: Tensor) -> Tensor:
        """Waves (B, n) in [-1, 1] of codes (B, n / hop, Q)."""
        if codes.dim() != 3 or codes.shape[1] < 1:
            raise ValueError(f"codes: got {tuple(codes.shape)}; expected (B, frames, {self.levels})")
        return self.lapped.inverse(self._coefficients(self.quantiser.decode(codes))).clamp(-1, 1)

    def reconstruct(self, wave: Tensor) -> Tensor:
        """Waves as they come back from their codes."""
        return self.decode(self.encode(wave))

    def latents(self, wave: Tensor) -> Tensor:
        """What is quantised: (B, n / hop, D)."""
        if wave.dim() != 2 or wave.shape[1] % self.setting.hop or not wave.shape[1]:
            raise ValueError(f"wave: got {tuple(wave.shape)}; expected (B, n), n a multiple of {self.setting.hop}")
        h = self.enter((self.lapped(wave) / self.scale).transpose(1, 2))
        h = h + self.inner(F.gelu(h))
        return self.to_latent(F.gelu(h)).transpose(1, 2)

    def spectrum(self, wave: Tensor) -> Tensor:
        """Log-magnitudes (B, n / hop, hop + 1) around each frame; a sine's is that of its amplitude over the data's deviation."""
        hop = self.setting.hop
        frames = F.pad(wave, (hop // 2, hop // 2)).unfold(-1, 2 * hop, hop)
        magnitude = torch.fft.rfft(frames * self.window).abs() * (2 / hop) / self.scale
        return torch.log(magnitude + FLOOR)

    def target(self, wave: Tensor) -> Tensor:
        """What the first level is aligned to: the log-spectrum pooled to bands, standardised (B, n / hop, bands)."""
        return (self.spectrum(wave) @ self.pool - self.center) / self.spread

    def loss(self, wave: Tensor) -> tuple[Tensor, dict[str, float]]:
        """The training loss (scalar) of waves (B, n) and its parts."""
        s = self.setting
        z = self.latents(wave)
        codes = self.quantiser.encode(z.detach())
        q = z + (self.quantiser.decode(codes) - z).detach()  # straight through
        found = self._coefficients(q)
        back = self.lapped.inverse(found)
        reconstruction = ((back - wave) / self.scale).square().mean()
        spectral = (self.spectrum(back) - self.spectrum(wave)).abs().mean()
        first = z + (self.quantiser.decode(codes, 1) - z).detach()
        semantic = (self.meaning(first) - self.target(wave)).square().mean()
        commitment = self.quantiser.pull(z, codes)
        parts = {"reconstruction": reconstruction, "spectral": spectral, "semantic": semantic, "commitment": commitment}
        weights = {"reconstruction": 1.0, "spectral": s.spectral, "semantic": s.semantic, "commitment": s.commitment}
        loss = torch.stack([weights[name] * part for name, part in parts.items()]).sum()
        return loss, {name: float(part.detach()) for name, part in parts.items()}

    def _coefficients(self, latents: Tensor) -> Tensor:
        h = self.from_latent(latents.transpose(1, 2))
        h = h + self.outer(F.gelu(h))
        return self.leave(F.gelu(h)).transpose(1, 2) * self.scale


def _bands(count: int, bins: int) -> Tensor:
    """Weights (bins, count) that average bins to bands: linear up to an eighth of the range, wider above, none empty."""
    edges = torch.linspace(0, 1, count + 1) ** 1.5 * bins
    edges = edges.round().long()
    for i in range(1, count + 1):
        edges[i] = max(int(edges[i]), int(edges[i - 1]) + 1)
    edges = edges.clamp_max(bins)
    weights = torch.zeros(bins, count)
    for i in range(count):
        low = min(int(edges[i]), bins - 1)
        high = max(int(edges[i + 1]), low + 1)
        weights[low:high, i] = 1 / (high - low)
    return weights
