"""The supervised start of reinforcement learning: reference traces of the environments' questions, in their own format."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from raysys.runtime.seeds import Seeds, Stream
from raysys.systems.ernie.rl.policy import Policy
from raysys.systems.ernie.rl.questions import Asked, turn_at, turns_of
from raysys.systems.ernie.rl.setting import WarmSetting
from raysys.systems.ernie.stream import Special


class WarmStart:
    """A `raysys.runtime.train.Learner` of -log pi(trace, <eos> | prompt), the mean over tokens.

    Args:
        asked: questions of all environments; they take turns by their weights (`WarmSetting.weights`).
    """

    def __init__(self, policy: Policy, setting: WarmSetting, asked: Sequence[Asked], seed: int) -> None:
        self.policy, self.setting, self.seeds = policy, setting, Seeds(seed)
        self.asked: dict[str, list[Asked]] = {}
        for one in asked:
            self.asked.setdefault(one.name, []).append(one)
        weights = setting.weights.model_dump()
        self.turns = turns_of([weights[name] for name in self.asked])
        self.steps, self.blocks = setting.steps, setting.blocks
        self._told: dict[str, float] = {}

    @property
    def module(self) -> nn.Module:
        return self.policy.module

    def before(self, step: int) -> None:
        """Nothing is kept from one step for the next."""

    def loss(self, step: int, block: int) -> Tensor:
        count = self.setting.batch // self.blocks
        first = (step * self.blocks + block) * count
        chosen = [self._at(position) for position in range(first, first + count)]
        answers = [np.append(one.trace, int(Special.EOS)) for one in chosen]
        logp, mask, entropy = self.policy.answer_logp(
            [one.prompt for one in chosen], answers, temperature=1.0, routes=None
        )
        self._told = {"entropy": float(entropy[mask].mean())}
        return -logp[mask].mean()

    def _at(self, position: int) -> Asked:
        """The question at a position of the endless sequence; each environment goes through its own in seeded orders."""
        environment, place = turn_at(self.turns, position)
        own = list(self.asked.values())[environment]
        epoch, place = divmod(place, len(own))
        return own[int(self.seeds.rng(Stream.BATCH, environment, epoch).permutation(len(own))[place])]

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
