"""The training engine of reinforcement learning: one iteration's answers to a few optimizer steps.

Shapes: B = BS G answers, n tokens of the longest.

Notable choices
- pi_old is computed before the first step, with the batches of the steps themselves; in the first step it is pi_new itself.
- Answers of a query whose rewards are all equal have advantage 0, hence no gradient. They are counted in the average (unless it
  is DAPO's), and not computed; measurements such as the entropy are of the others. A minibatch without others makes no step.
- Minibatches are whole queries, dealt round the environments' alternation: each is a mixture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raysys.runtime.exact import load_optimizer
from raysys.systems.ernie.rl import objective
from raysys.systems.ernie.rl.policy import Policy
from raysys.systems.ernie.rl.questions import Asked
from raysys.systems.ernie.rl.rollout import Answer, right
from raysys.systems.ernie.rl.setting import RLSetting

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class Trained:
    """A query that an iteration trains on."""

    asked: Asked
    answers: tuple[Answer, ...]
    rate: float
    """Success rate of its question so far, these answers included."""


class Updater:
    """AdamW on a policy objective."""

    def __init__(self, policy: Policy, setting: RLSetting) -> None:
        self.policy, self.setting = policy, setting
        self.named = {name: p for name, p in policy.module.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.named.values(), lr=setting.lr, betas=(0.9, 0.95), weight_decay=0.0)

    def update(self, iteration: int, queries: Sequence[Trained]) -> dict[str, float]:
        """Make the iteration's optimizer steps; returns measurements, means over them."""
        s = self.setting
        rewards = torch.from_numpy(right([query.answers for query in queries]))
        advantage = objective.group_advantages(rewards.flatten(), rewards.shape[1], s.objective.scale).view_as(rewards)
        informative = objective.informative(rewards.flatten(), rewards.shape[1]).view_as(rewards)[:, 0]
        batches = []
        for part in np.array_split(np.arange(len(queries)), s.minibatches):
            kept = part[informative.numpy()[part]]
            if len(kept):
                rows = _Rows([queries[i] for i in kept], advantage[torch.from_numpy(kept)], s)
                batches.append(rows)
                if not s.objective.dynamic:
                    rows.share = _counted(queries, kept, s) / _counted(queries, part, s)
        for group in self.optimizer.param_groups:
            group["lr"] = s.lr * min(1.0, (iteration + 1) / (s.warmup + 1)) * (1 - iteration / s.iterations)
        with torch.no_grad():
            for rows in batches[1:]:
                rows.old = self._logp(rows)[0]
        told = [self._step(rows) for rows in batches]
        names = told[0] if told else {}
        return {
            "informative": float(informative.double().mean()),
            "gradient": 0.0,
            **{k: float(np.mean([t[k] for t in told])) for k in names},
        }

    def _logp(self, rows: _Rows) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies (B, n) under the current weights."""
        logp, _, entropy = self.policy.answer_logp(
            rows.prompts, rows.ids, temperature=self.setting.temperature, routes=rows.routes
        )
        return logp, entropy

    def _step(self, rows: _Rows) -> dict[str, float]:
        new, entropy = self._logp(rows)
        old = new.detach() if rows.old is None else rows.old
        judged = objective.Judged(new, old, rows.infer, rows.mask, rows.advantage, entropy, rows.rate)
        value, metrics = objective.loss(self.setting.objective, judged)
        value = value * rows.share
        self.optimizer.zero_grad(set_to_none=True)
        value.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self.named.values(), self.setting.clip)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"the gradient's norm is {float(norm)}")
        self.optimizer.step()
        return {"loss": float(value.detach()), "gradient": float(norm), **metrics}

    def state(self) -> dict[str, Tensor]:
        """The module's and the optimizer's tensors by name."""
        found = {f"module/{name}": value.detach().cpu() for name, value in self.policy.module.state_dict().items()}
        for name, p in self.named.items():
            found |= {f"optimizer/{name}/{key}": value.cpu() for key, value in self.optimizer.state.get(p, {}).items()}
        return found

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        own = {key.removeprefix("module/"): value for key, value in state.items() if key.startswith("module/")}
        self.policy.module.load_state_dict(own)
        load_optimizer(self.optimizer, self.named, dict(state))


class _Rows:
    """Answers of some queries as tensors."""

    def __init__(self, queries: Sequence[Trained], advantage: Tensor, setting: RLSetting) -> None:
        answers = [one for query in queries for one in query.answers]
        self.prompts = [query.asked.prompt for query in queries for _ in query.answers]
        self.ids = [one.ids for one in answers]
        longest = max(len(ids) for ids in self.ids)
        self.infer = torch.zeros(len(answers), longest)
        self.mask = torch.zeros(len(answers), longest, dtype=torch.bool)
        for row, one in enumerate(answers):
            self.infer[row, : len(one.ids)] = torch.from_numpy(one.logp)
            self.mask[row, one.hint : len(one.ids)] = True
        self.advantage = advantage.flatten()
        self.rate = torch.tensor([query.rate for query in queries for _ in query.answers])
        self.routes = None
        if setting.replay_routes:
            routes = [one.routes for one in answers]
            if any(route is None for route in routes):
                raise ValueError("replay_routes: the rollout engine has recorded no routes")
            self.routes = [route for route in routes if route is not None]
        self.old: Tensor | None = None
        self.share = 1.0
        """Of the average that is over these answers and those that have no gradient."""


def _counted(queries: Sequence[Trained], which: NDArray[np.int64], setting: RLSetting) -> int:
    """What the objective's average divides by: answers, or tokens."""
    answers = [one for i in which for one in queries[i].answers]
    return len(answers) if setting.objective.average == "sequence" else sum(one.drawn for one in answers)
