"""The loop of reinforcement learning: draw by the unbiased replay buffer's schedule, judge, update, measure.

Notable choices
- Who answers (`Hands`) is handed in: this process, or rollout actors. All decisions (schedule, calls, hints, randomness) are made
  here, so hands cannot change a bit.
- All that lasts from one iteration to the next is in `state`: weights and optimizer, the schedule, answers under way, and how
  often each question was answered rightly. An iteration is a function of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from raysys.systems.ernie.rl.hints import hint_of, hint_share, pass_at
from raysys.systems.ernie.rl.policy import Policy, Weights, weights_of
from raysys.systems.ernie.rl.questions import Questions
from raysys.systems.ernie.rl.rollout import Answer, Call, Groups, right, start
from raysys.systems.ernie.rl.setting import RLSetting
from raysys.systems.ernie.rl.updater import Trained, Updater
from raysys.systems.ernie.rl.urb import Buffer, Progress
from raysys.systems.ernie.stream import I64

NONE: I64 = np.zeros(0, np.int64)


class Hands(Protocol):
    """Who answers calls."""

    def answer(self, weights: Weights, calls: Sequence[Call]) -> list[Groups]:
        """The groups of each call, all of which use these weights (of version `calls[0].version`)."""


class Loop:
    """One run of reinforcement learning.

    Args:
        policy: the training engine; its weights are the start.
        hands: the rollout engine, with its own copy of the policy.
    """

    def __init__(self, policy: Policy, hands: Hands, questions: Questions, setting: RLSetting) -> None:
        self.hands, self.questions, self.setting = hands, questions, setting
        self.updater = Updater(policy, setting)
        b = setting.buffer
        self.buffer = Buffer(setting.iterations * b.batch, b.batch, b.depth, b.slots or b.batch * (b.depth + 1) // 2)
        self.under_way: dict[int, tuple[Answer, ...]] = {}
        self.seen = np.zeros((len(questions.train), 2))
        """(E P, 2) of each question: answers, right answers."""
        self.passed = np.zeros(len(questions.train))
        """(E P) pass@k of each question before RL; 0 where hints are off."""

    @property
    def iteration(self) -> int:
        return self.buffer.iteration

    def prepare(self) -> None:
        """Measure pass@k of every training question, if hints need it."""
        if not self.setting.hints.initial:
            return
        every = tuple(range(len(self.questions.train)))
        tries = self.setting.hints.tries
        groups = self._ask(every, [tuple(start(NONE) for _ in range(tries))] * len(every), -1, 0)
        self.passed = np.array([pass_at(np.array([one.reward for one in group]), tries) for group in groups])

    def iterate(self) -> dict[str, float]:
        """One iteration; returns its measurements."""
        t, count = self.iteration, 0
        due = list(self.buffer.due)
        weights = weights_of(self.updater.policy.module)

        def advance(queries: Sequence[int], budget: int | None) -> list[Progress]:
            nonlocal count
            before = [self.under_way[q] if q in self.under_way else self._begin(q, t) for q in queries]
            after = self._ask([self.questions.of_query(q) for q in queries], before, t, count, budget, weights)
            count += len(queries)
            told = []
            for q, old, new in zip(queries, before, after, strict=True):
                self.under_way[q] = new
                ticks = max(b.drawn - a.drawn for a, b in zip(old, new, strict=True))
                told.append(Progress(ticks, all(one.finished for one in new)))
            return told

        ticks = self.buffer.run(advance)
        queries = []
        for q in due:
            answers, question = self.under_way.pop(q), self.questions.of_query(q)
            self.seen[question] += (len(answers), sum(one.reward == 1 for one in answers))
            rate = float(self.seen[question, 1] / self.seen[question, 0])
            queries.append(Trained(self.questions.train[question], answers, rate))
        return {**measured(queries, self.questions.names, t), "ticks": float(ticks), **self.updater.update(t, queries)}

    def _begin(self, query: int, t: int) -> tuple[Answer, ...]:
        question, h = self.questions.of_query(query), self.setting.hints
        share = hint_share(t, float(self.passed[question]), h.initial, h.gamma, h.floor)
        hint = hint_of(self.questions.train[question].trace, share)
        return tuple(start(hint) for _ in range(self.setting.buffer.group))

    def _ask(
        self, questions: Sequence[int], answers: Sequence[tuple[Answer, ...]], version: int, first: int,
        budget: int | None = None, weights: Weights | None = None, split: str = "train", temperature: float | None = None,
    ) -> Groups:  # fmt: skip
        """Answers of all questions, in calls of so many; `first` numbers the calls' random numbers."""
        b = self.setting.buffer
        size = b.calls if len(answers[0]) == b.group else max(1, b.calls * b.group // len(answers[0]))
        heat = self.setting.temperature if temperature is None else temperature
        calls = [
            Call(version, first + i, tuple(questions[i : i + size]), tuple(answers[i : i + size]), budget, split, heat)
            for i in range(0, len(questions), size)
        ]
        weights = weights_of(self.updater.policy.module) if weights is None else weights
        return [group for groups in self.hands.answer(weights, calls) for group in groups]

    def evaluate(self) -> dict[str, NDArray[np.float32]]:
        """Rewards of the held-out questions: (E, m) of the most likely answers, and of one drawn at temperature 1 each.

        The rollout engine answers, without hints and without an injected mismatch."""
        every = tuple(range(len(self.questions.test)))
        found = {}
        for name, temperature in (("greedy", 0.0), ("drawn", 1.0)):
            begun = [(start(NONE),)] * len(every)
            groups = self._ask(every, begun, -1, 1_000_000, split="test", temperature=temperature)
            found[name] = right(groups).reshape(len(self.questions.names), -1)
        return found

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Tensors and plain values from which `load` goes on."""
        tensors: dict[str, Any] = {**self.updater.state(), "loop/seen": self.seen, "loop/passed": self.passed}
        told = []
        for q, group in sorted(self.under_way.items()):
            for j, one in enumerate(group):
                for name in ("ids", "logp", "version", "routes"):
                    if getattr(one, name) is not None:
                        tensors[f"answers/{q}/{j}/{name}"] = getattr(one, name)
                told.append([q, j, one.hint, one.reward])
        b = self.buffer
        return tensors, {"iteration": b.iteration, "begun": b.begun, "held": list(b.held), "answers": told}

    def load(self, tensors: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self.updater.load({k: v for k, v in tensors.items() if isinstance(v, torch.Tensor)})
        self.seen, self.passed = tensors["loop/seen"], tensors["loop/passed"]
        self.buffer.iteration, self.buffer.begun, self.buffer.held = (
            meta["iteration"],
            meta["begun"],
            list(meta["held"]),
        )
        found: dict[int, list[Answer]] = {}
        for q, j, hint, reward in meta["answers"]:
            ids, logp, version = (tensors[f"answers/{q}/{j}/{name}"] for name in ("ids", "logp", "version"))
            one = Answer(ids, logp, version, hint, tensors.get(f"answers/{q}/{j}/routes"), reward)
            found.setdefault(q, []).append(one)
        self.under_way = {q: tuple(group) for q, group in found.items()}


def measured(queries: Sequence[Trained], names: Sequence[str], t: int) -> dict[str, float]:
    """Rewards by environment, lengths, and the age of tokens in iterations."""
    answers = [one for query in queries for one in query.answers]
    found = {"reward": float(np.mean([one.reward for one in answers]))}
    for name in names:
        own = [one.reward for query in queries if query.asked.name == name for one in query.answers]
        if own:
            found[f"reward {name}"] = float(np.mean(own))
    found["length"] = float(np.mean([one.drawn for one in answers]))
    versions = np.concatenate([one.version[one.hint :] for one in answers])
    found["age"] = float((t - versions).mean())
    found["hinted"] = float(np.mean([one.hint for one in answers]))
    return found
