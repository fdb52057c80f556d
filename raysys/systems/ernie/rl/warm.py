"""The supervised start of reinforcement learning: reference traces of the environments' questions, in their own format."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from raysys.runtime.seeds import Seeds, Stream
from raysys.systems.ernie.rl.policy import Policy
from raysys.systems.ernie.rl.questions import Asked
from raysys.systems.ernie.rl.setting import WarmSetting
from raysys.systems.ernie.stream import Special


class WarmStart:
    """A `raysys.runtime.train.Learner` of -log pi(trace, <eos> | prompt), the mean over tokens.

    Args:
        asked: questions of all environments, as many of each, environment by environment; a block draws evenly from all.
    """

    def __init__(
        self, policy: Policy, setting: WarmSetting, asked: Sequence[Asked], environments: int, seed: int
    ) -> None:
        self.policy, self.setting, self.asked, self.environments = policy, setting, asked, environments
        self.seeds = Seeds(seed)
        self.steps, self.blocks = setting.steps, setting.blocks
        self._told: dict[str, float] = {}

    @property
    def module(self) -> nn.Module:
        return self.policy.module

    def before(self, step: int) -> None:
        """Nothing is kept from one step for the next."""

    def loss(self, step: int, block: int) -> Tensor:
        count, each = self.setting.batch // self.blocks, len(self.asked) // self.environments
        first = (step * self.blocks + block) * count
        chosen = []
        for position in range(first, first + count):
            environment, place = position % self.environments, position // self.environments
            epoch, place = divmod(place, each)
            order = self.seeds.rng(Stream.BATCH, environment, epoch).permutation(each)
            chosen.append(self.asked[environment * each + int(order[place])])
        answers = [np.append(one.trace, int(Special.EOS)) for one in chosen]
        logp, mask, entropy = self.policy.answer_logp(
            [one.prompt for one in chosen], answers, temperature=1.0, routes=None
        )
        self._told = {"entropy": float(entropy[mask].mean())}
        return -logp[mask].mean()

    def learning_rate(self, step: int) -> float:
        """Warm-up over a tenth of the steps, then a half cosine to zero."""
        warm = max(1, self.steps // 10)
        rise = min(1.0, (step + 1) / warm)
        return self.setting.lr * rise * 0.5 * (1 + math.cos(math.pi * max(0, step - warm) / max(1, self.steps - warm)))

    def optimizer(self) -> torch.optim.Optimizer:
        trained = [p for p in self.module.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, betas=(0.9, 0.95), weight_decay=0.0)

    def metrics(self) -> dict[str, float]:
        return self._told
