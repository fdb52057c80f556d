"""A tabular policy of the interface of the model's: independent tokens by prompt and place, so everything has a closed form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raysys.systems.ernie.generate import Written
from raysys.systems.ernie.rl.questions import Asked, Questions, turns_of
from raysys.systems.ernie.rl.rollout import InProcess, Worker
from raysys.systems.ernie.rl.setting import RLSetting
from raysys.systems.ernie.steps import pick
from raysys.systems.ernie.stream import Special

VOCABULARY = 7
"""Ids 3 to 6 are words; 2 is <eos>, which the first place never has and the last one always."""
NAMES = ("arithmetic", "tones")


class Tabular:
    """logits[prompt, place]: a prompt is a number."""

    def __init__(self, prompts: int, longest: int = 10, seed: int = 0) -> None:
        self.module = nn.Module()
        drawn = torch.randn(prompts, longest, VOCABULARY, generator=torch.Generator().manual_seed(seed))
        drawn[:, :, :2] = -30.0
        drawn[:, 0, int(Special.EOS)] = -30.0
        drawn[:, -1, int(Special.EOS)] = 30.0
        self.module.logits = nn.Parameter(drawn)
        self.module.router = nn.Parameter(torch.zeros(2), requires_grad=False)

    def write(
        self,
        prompts: Sequence[Any],
        begun: Sequence[Any],
        *,
        limit: int,
        temperature: float,
        generator: Any,
        routes: bool,
    ) -> Written:
        draws = torch.rand(len(prompts), limit, generator=generator)
        ids, logp, ended, read = [], [], [], []
        for row, (prompt, first) in enumerate(zip(prompts, begun, strict=True)):
            own, values, end = [], [], False
            for i in range(limit):
                logits = self.module.logits[prompt, len(first) + i][None]
                token, value = pick(logits.detach(), temperature, draws[row, [i]])
                values.append(float(value))
                end = int(token) == Special.EOS
                if end:
                    break
                own.append(int(token))
            ids.append(np.array(own, np.int64))
            logp.append(np.array(values, np.float32))
            ended.append(end)
            places = 1 + len(first) + len(own) - (0 if end else 1)
            read.append(np.full((places, 1, 1), len(first), np.int16))  # tells which call chose
        return Written(ids, logp, ended, read if routes else None)

    def answer_logp(
        self, prompts: Sequence[Any], answers: Sequence[Any], *, temperature: float, routes: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        spread = (self.module.logits[torch.tensor(list(prompts))] / temperature).log_softmax(-1)
        longest = max(map(len, answers))
        ids = torch.zeros(len(answers), longest, dtype=torch.int64)
        mask = torch.zeros(len(answers), longest, dtype=torch.bool)
        for row, answer in enumerate(answers):
            ids[row, : len(answer)] = torch.from_numpy(answer)
            mask[row, : len(answer)] = True
        logp = spread[:, :longest].gather(-1, ids[..., None])[..., 0]
        entropy = -(spread.exp() * spread).sum(-1)[:, :longest]
        return logp * mask, mask, entropy.detach() * mask


class FirstWord:
    """Judges by the first word: each question has its own right one."""

    def reward(self, asked: Asked, text: str) -> float:
        return float(text[:1] == str(3 + asked.prompt % 4))


def decode(ids: Any) -> str:
    return "".join(map(str, ids))


def questions(each: int = 4, seed: int = 0) -> Questions:
    trace = np.array([3, 4, 5])
    train = [Asked(n, "train", i, e * each + i, trace) for e, n in enumerate(NAMES) for i in range(each)]
    test = [Asked(n, "test", i, e * each + i, trace) for e, n in enumerate(NAMES) for i in range(each)]
    return Questions(NAMES, train, test, seed, turns_of([1] * len(NAMES)))


def setting(**values: Any) -> RLSetting:
    base = {"environments": NAMES, "iterations": 6, "prompts": 4, "limit": 10, "lr": 0.3, "warmup": 0, "test": 4}
    base |= {"buffer": {"batch": 4, "group": 4, "depth": 2, "calls": 2}}
    return RLSetting.of({**base, **values})


def worker(given: RLSetting, seed: int = 0) -> Worker:
    return Worker(Tabular(8), questions(), FirstWord(), decode, given, seed)  # type: ignore[arg-type]


def in_process(given: RLSetting) -> InProcess:
    return InProcess(worker(given))
