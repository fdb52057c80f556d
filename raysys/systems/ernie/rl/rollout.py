"""Answers under way: drawing tokens, under whatever weights are current, until an answer is finished and judged.

Shapes: G answers of a query, n tokens, m places read (prompt and answer), L layers, k experts.

Notable choices
- An answer may begin under older weights and go on under newer ones. Every token keeps the log-probability it was drawn with,
  the version of the weights, and (for R3) the experts of the place it was drawn from.
- What a call returns is a function of the weights and the call alone, so a call may be made again, by any worker. How queries
  are put into calls is fixed by the schedule, not by the number of workers; so neither can change a bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from raysys.runtime.seeds import Seeds, Stream
from raysys.systems.ernie.rl.policy import I64, Policy, Weights, mismatched, put_weights
from raysys.systems.ernie.rl.questions import Asked, Judge, Questions
from raysys.systems.ernie.rl.setting import RLSetting
from raysys.systems.ernie.stream import Special

F32 = NDArray[np.float32]
NO_REWARD = -1.0


@dataclass(frozen=True)
class Answer:
    """An answer so far."""

    ids: I64
    """(n,) the hint, then what was drawn, <eos> included."""
    logp: F32
    """(n,) of each token under the engine that drew it; 0 for the hint."""
    version: I64
    """(n,) the weights it was drawn with, by iteration; -1 for the hint."""
    hint: int
    """Tokens of the hint."""
    routes: NDArray[np.int16] | None = None
    """(m, L, k) experts of each place, as chosen when the token after it was drawn."""
    reward: float = NO_REWARD
    """What it earned; NO_REWARD while it is not finished."""

    @property
    def drawn(self) -> int:
        return len(self.ids) - self.hint

    @property
    def finished(self) -> bool:
        return self.reward != NO_REWARD

    def text_ids(self) -> I64:
        """(n,) without <eos>."""
        ended = len(self.ids) > 0 and int(self.ids[-1]) == Special.EOS
        return self.ids[:-1] if ended else self.ids


def start(hint: I64) -> Answer:
    """An answer that begins with a hint, or with nothing (0,)."""
    n = len(hint)
    return Answer(hint, np.zeros(n, np.float32), np.full(n, -1, np.int64), n)


@dataclass(frozen=True)
class Call:
    """What a worker is asked for: go on with the answers of some queries."""

    version: int
    """The weights to use, by iteration; -1 for measuring. Also the round of its random numbers."""
    number: int
    """Of the call within its version; the node of its random numbers."""
    questions: tuple[int, ...]
    answers: tuple[tuple[Answer, ...], ...]
    """For each question, its answers so far."""
    budget: int | None
    """Tokens to draw at most for each answer; None: until it is finished."""
    split: str = "train"
    temperature: float = 1.0


Groups = list[tuple[Answer, ...]]
"""For each question of a call, its answers."""


class Worker:
    """Draws and judges answers, in this process."""

    def __init__(
        self, policy: Policy, questions: Questions, judge: Judge, decode: Callable[[I64], str], setting: RLSetting, seed: int
    ) -> None:  # fmt: skip
        self.policy, self.questions, self.judge, self.decode = policy, questions, judge, decode
        self.setting, self.seed = setting, seed

    def load(self, weights: Weights, version: int) -> None:
        """Take on weights, with the mismatch that the setting injects; version -1 (measuring) has none."""
        s = self.setting
        kind = s.mismatch if version >= 0 else "none"
        put_weights(self.policy.module, mismatched(weights, kind, s.sigma, self.seed, version))

    def answer(self, call: Call) -> Groups:
        """Go on with a call's answers."""
        asked = self.questions.train if call.split == "train" else self.questions.test
        rows = [(i, j) for i, group in enumerate(call.answers) for j, one in enumerate(group) if not one.finished]
        limit = self.setting.limit
        left = {row: limit - call.answers[row[0]][row[1]].drawn for row in rows}
        if call.budget is not None:
            left = {row: min(count, call.budget) for row, count in left.items()}
        found = [list(group) for group in call.answers]
        if rows:
            given = [call.answers[i][j] for i, j in rows]
            written = self.policy.write(
                [asked[call.questions[i]].prompt for i, _ in rows],
                [one.ids for one in given],
                limit=max(left.values()),
                temperature=call.temperature,
                generator=Seeds(self.seed).generator(Stream.ROLLOUT, call.number, call.version),
                routes=self.setting.replay_routes,
            )
            for r, (i, j) in enumerate(rows):
                routes = written.routes[r] if written.routes is not None else None
                more = _longer(
                    given[r], written.ids[r], written.logp[r], written.ended[r], left[i, j], call.version, routes
                )
                done = more.drawn >= limit or int(more.ids[-1]) == Special.EOS
                found[i][j] = self._judged(asked[call.questions[i]], more) if done else more
        return [tuple(group) for group in found]

    def _judged(self, asked: Asked, answer: Answer) -> Answer:
        """An answer that was cut off at the limit earns nothing."""
        ended = int(answer.ids[-1]) == Special.EOS
        return replace(answer, reward=self.judge.reward(asked, self.decode(answer.text_ids())) if ended else 0.0)


class InProcess:
    """A worker's hands in this process."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self._has: tuple[Weights, int] | None = None

    def answer(self, weights: Weights, calls: Sequence[Call]) -> list[Groups]:
        """See `loop.Hands`."""
        version = calls[0].version
        if self._has is None or self._has[0] is not weights or self._has[1] != version:
            self.worker.load(weights, version)
            self._has = (weights, version)
        return [self.worker.answer(call) for call in calls]


def _longer(
    answer: Answer, ids: I64, logp: F32, ended: bool, most: int, version: int, routes: NDArray[np.int16] | None
) -> Answer:
    """The answer with at most `most` of the tokens that were drawn."""
    drawn = np.append(ids, int(Special.EOS)) if ended else ids
    drawn, logp = drawn[:most].astype(np.int64), logp[:most]
    if routes is not None:
        places = len(routes) - len(ids) + (0 if ended else 1)  # of the prompt and what the call began with
        routes = routes[: places + len(drawn) - 1]
        if answer.routes is not None:  # places that were drawn from before keep what was chosen then
            routes = np.concatenate([answer.routes, routes[len(answer.routes) :]])
    return Answer(
        np.concatenate([answer.ids, drawn]),
        np.concatenate([answer.logp, logp.astype(np.float32)]),
        np.concatenate([answer.version, np.full(len(drawn), version)]),
        answer.hint,
        routes,
    )


def right(groups: Sequence[Sequence[Answer]]) -> NDArray[np.float32]:
    """Rewards (q, G) of finished answers."""
    return np.array([[one.reward for one in group] for group in groups], np.float32)
