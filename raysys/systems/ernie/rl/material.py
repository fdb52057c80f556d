"""What every process of a reinforcement learning run needs to know, and the policy and worker made from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from raysys.systems.ernie.model import UniModel
from raysys.systems.ernie.rl.policy import ModelPolicy, Weights, put_weights
from raysys.systems.ernie.rl.questions import Asked, Judge, Questions
from raysys.systems.ernie.rl.rollout import Worker
from raysys.systems.ernie.rl.setting import RLSetting
from raysys.systems.ernie.setting import ModelSetting, Sizes
from raysys.systems.ernie.tokenizers.text import TextTokenizer


@dataclass(frozen=True)
class Material:
    """Sizes of the model, the text tokenizer, and all questions, read by the tokenizers once."""

    model: ModelSetting
    sizes: Sizes
    multi_token: bool
    """Whether the model has the module of multi-token prediction (RL does not use it, but keeps it)."""
    text: bytes
    options: Mapping[str, Mapping[str, Any]]
    questions: Questions
    warm: tuple[Asked, ...]
    """Questions of the warm start, environment by environment."""

    def policy(self, weights: Weights | None = None) -> ModelPolicy:
        """The model as a policy, with some weights or with random ones."""
        model = UniModel(self.model, self.sizes)
        if not self.multi_token:
            model.mtp = None
        if weights is not None:
            put_weights(model, weights)
        return ModelPolicy(model)

    def asked(self, seed: int) -> Questions:
        """The questions, in a seed's order."""
        return replace(self.questions, seed=seed)

    def worker(self, setting: RLSetting, seed: int) -> Worker:
        """Who answers and judges."""
        decode = TextTokenizer.from_bytes(self.text).decode
        return Worker(self.policy(), self.asked(seed), Judge(self.options), decode, setting, seed)
