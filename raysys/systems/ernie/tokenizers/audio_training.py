"""Training of the audio tokenizer, and how good it is."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from raysys.runtime.seeds import Seeds, Stream
from raysys.systems.ernie.tokenizers.audio import AudioCodec, AudioSetting


class AudioLearner:
    """Trains the codec (raysys.runtime.train.Learner) on waves (N, n) in [-1, 1]."""

    def __init__(self, setting: AudioSetting, waves: Tensor, seed: int = 0, device: str = "cpu") -> None:
        self.setting, self.blocks, self.steps, self.seeds = setting, setting.blocks, setting.steps, Seeds(seed)
        self.waves = waves.to(device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(self.seeds.bits(Stream.INIT, 0, -1, 1)[0, 0] >> 1))
            self.module = AudioCodec(setting).to(device)
        sample = self.waves[:256]
        self.module.scale.fill_(sample.std().clamp_min(1e-3))  # also that of coefficients: the transform is orthogonal
        pooled = self.module.spectrum(sample) @ self.module.pool
        self.module.center.copy_(pooled.mean((0, 1)))
        self.module.spread.copy_(pooled.std((0, 1)).clamp_min(0.1))
        self.told: dict[str, float] = {}

    def before(self, step: int) -> None:
        """Let the codebooks follow the latents of the step's first block; dead codes start again, but for the last fifth."""
        with torch.no_grad():
            latents = self.module.latents(self._batch(step, 0))
        drawn = self.seeds.generator(Stream.SHUFFLE, 0, step)
        self.module.quantiser.observe(latents, drawn, restart=step < 0.8 * self.steps)

    def loss(self, step: int, block: int) -> Tensor:
        loss, self.told = self.module.loss(self._batch(step, block))
        return loss

    def learning_rate(self, step: int) -> float:
        warm = min(1.0, (step + 1) / max(1.0, 0.05 * self.steps))
        return self.setting.lr * warm * 0.5 * (1 + math.cos(math.pi * step / self.steps))

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.module.parameters(), betas=(0.9, 0.95), weight_decay=0.0)

    def metrics(self) -> dict[str, float]:
        return self.told

    def _batch(self, step: int, block: int) -> Tensor:
        count = -(-self.setting.batch // self.blocks)
        which = self.seeds.integers(Stream.BATCH, block, step, count, len(self.waves))[0]
        return self.waves[torch.from_numpy(which)]


@torch.no_grad()
def report(codec: AudioCodec, waves: Tensor) -> dict[str, float]:
    """Quality on waves (N, n): SNR in dB, log-spectral distance (mean absolute difference in dB), how the codes are used.

    `meaning` is how much of the first level's target is explained by it (1 is all, 0 is no more than the mean).
    """
    codes = torch.cat([codec.encode(part) for part in torch.split(waves, 256)])
    back = torch.cat([codec.decode(part) for part in torch.split(codes, 256)])
    noise = float((back - waves).double().square().mean())
    power = float(waves.double().square().mean())
    apart = (codec.spectrum(back) - codec.spectrum(waves)).abs().mean()
    target = codec.target(waves)
    left = (codec.meaning(codec.quantiser.decode(codes, 1)) - target).square().mean()
    told = {
        "SNR": 10 * math.log10(power / max(noise, 1e-12)),
        "log-spectral distance": float(apart) * 20 / math.log(10),
        "meaning": 1 - float(left / target.var(correction=0)),
    }
    for level, share in enumerate(codec.quantiser.usage(codes), 1):
        bits = float(torch.special.entr(share.double()).sum() / math.log(2))
        told |= {f"level {level} entropy": bits, f"level {level} unused": float((share == 0).sum())}
    return told
