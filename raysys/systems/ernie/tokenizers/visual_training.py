"""Training of the visual tokenizer, and how good it is.

Notable choices
- Images first, with single frames of videos among them, then whole videos beside images: the second part only has to learn what
  the frames before add.
- Half-way statistics are never trained on: a step's loss normalises by its own batch, and what encoding uses afterwards is the
  average that `before` keeps.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from raysys.runtime.seeds import Seeds, Stream
from raysys.systems.ernie.tokenizers.visual import VisualSetting, VisualTokenizer


class VisualLearner:
    """Trains the codec on images, then on videos and images (raysys.runtime.train.Learner).

    Args:
        images: (N, C, H, W) in [0, 1].
        videos: (M, T, C, H, W), or None: then all steps are on images.
    """

    def __init__(
        self, setting: VisualSetting, images: Tensor, videos: Tensor | None = None, seed: int = 0, device: str = "cpu"
    ) -> None:
        self.setting, self.blocks, self.seeds = setting, setting.blocks, Seeds(seed)
        self.images, self.videos = images.to(device), None if videos is None else videos.to(device)
        self.steps = setting.image_steps + setting.video_steps
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(self.seeds.bits(Stream.INIT, 0, -1, 1)[0, 0] >> 1))
            self.module = VisualTokenizer(setting, *images.shape[1:]).to(device)
        self.module.center.fill_(images.mean())
        self.module.spread.fill_(images.std().clamp_min(1e-3))
        self.told: dict[str, float] = {}

    def before(self, step: int) -> None:
        """Look at the latents' statistics now and then, on the first block of the step."""
        if step % self.setting.observe_every == 0:
            with torch.no_grad():
                self.module.quantiser.observe(
                    torch.cat([self.module.raw(x).flatten(0, 1) for x in self._batch(step, 0)])
                )

    def loss(self, step: int, block: int) -> Tensor:
        batch = self._batch(step, block)
        losses, self.told = list[Tensor](), {}
        for frames in batch:
            loss, told = self.module.loss(frames)
            losses.append(loss)
            self.told = {name: self.told.get(name, 0.0) + value / len(batch) for name, value in told.items()}
        return torch.stack(losses).mean()

    def learning_rate(self, step: int) -> float:
        warm = min(1.0, (step + 1) / max(1.0, 0.05 * self.steps))
        return self.setting.lr * warm * 0.5 * (1 + math.cos(math.pi * step / self.steps))

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.module.parameters(), betas=(0.9, 0.95), weight_decay=0.0)

    def metrics(self) -> dict[str, float]:
        return self.told

    def _batch(self, step: int, block: int) -> list[Tensor]:
        """Pictures (b, 1, C, H, W), half of them frames of videos; in the second part videos (b', T, C, H, W) take that half."""
        count = -(-self.setting.batch // self.blocks)
        if self.videos is None:
            return [self._images(step, block, count)]
        images, length = self._images(step, block, -(-count // 2)), self.videos.shape[1]
        moving = step >= self.setting.image_steps
        many = -(-count // 2)
        clips = -(-many // length) if moving else many
        which = self.seeds.integers(Stream.BATCH, block + self.blocks, step, clips, len(self.videos))[0]
        found = self.videos[torch.from_numpy(which)]
        if moving:
            return [images, found]
        at = self.seeds.integers(Stream.BATCH, block + 2 * self.blocks, step, clips, length)[0]
        return [torch.cat([images, found[torch.arange(clips), torch.from_numpy(at)][:, None]])]

    def _images(self, step: int, block: int, count: int) -> Tensor:
        which = self.seeds.integers(Stream.BATCH, block, step, count, len(self.images))[0]
        return self.images[torch.from_numpy(which)][:, None]


@torch.no_grad()
def report(tokenizer: VisualTokenizer, frames: Tensor) -> dict[str, float]:
    """Quality on frames (N, T, C, H, W): PSNR in dB, the code's error (latents have variance 1), entropy of a bit by scale."""
    z = torch.cat([tokenizer.encode(part) for part in torch.split(frames, 256)])
    acc = tokenizer.quantiser.quantise(z)
    back = torch.cat([tokenizer.decode(part) for part in torch.split(acc, 256)])
    error = float((back - frames).double().square().mean())
    told = {"PSNR": -10 * math.log10(max(error, 1e-12)), "code error": float((z - acc).square().mean())}
    sizes = [f"{h} x {w}" for h, w in tokenizer.scales]
    entropies = tokenizer.quantiser.entropy(z)
    return told | {f"bit entropy {size}": value for size, value in zip(sizes, entropies, strict=True)}
