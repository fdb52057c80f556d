"""Questions of the environments, in a fixed order: what is asked in which iteration, and who judges the answers.

Notable choices
- Queries alternate between the environments, in turns, so every batch and minibatch is a mixture (unified RL [P]). Each
  environment's own questions come in seeded orders, one for each epoch.
- A question is known by (environment, seed, split): the judge asks the environment again, and no answer key travels with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raysys.runtime.seeds import Seeds, Stream
from raysys.systems.ernie.environments import SingleTurn, make
from raysys.systems.ernie.environments.question import Split

I64 = NDArray[np.int64]
SPARE = 1_000_000
"""Seeds from here on are the warm start's and the reports': other draws than those of RL, and of tuning. Sums are few, and most
come in both."""

PATIENCE = 20
"""Seeds that are tried for each held-out question."""


@dataclass(frozen=True)
class Asked:
    """A question as the policy reads it."""

    name: str
    split: Split
    seed: int
    prompt: Any
    trace: I64
    """Tokens of the reference trace, without <eos>."""


@dataclass(frozen=True)
class Questions:
    """All questions of a run: (E P) to train on, environment by environment, and (E m) held-out ones."""

    names: tuple[str, ...]
    train: Sequence[Asked]
    test: Sequence[Asked]
    seed: int
    turns: tuple[int, ...]
    """Environments in the order in which they take turns (`turns_of`)."""

    def of_query(self, query: int) -> int:
        """Which training question the query-th query asks."""
        each = len(self.train) // len(self.names)
        environment, place = turn_at(self.turns, query)
        epoch, place = divmod(place, each)
        order = Seeds(self.seed).rng(Stream.SHUFFLE, environment, epoch).permutation(each)
        return environment * each + int(order[place])


def turns_of(weights: Sequence[int]) -> tuple[int, ...]:
    """A round in which environment e has weights[e] turns, the i-th of w at (i + 1/2) / w of it: (2, 1, 1) gives 0 1 2 0."""
    return tuple(e for _, e in sorted(((i + 0.5) / w, e) for e, w in enumerate(weights) for i in range(w)))


def turn_at(turns: tuple[int, ...], position: int) -> tuple[int, int]:
    """Whose turn a position of the endless sequence of rounds is, and how many turns it has had before."""
    round, turn = divmod(position, len(turns))
    environment = turns[turn]
    return environment, round * turns.count(environment) + turns[:turn].count(environment)


Read = Callable[[str, Any], Any]
"""Environment and observation to a prompt."""
Encode = Callable[[str], I64]


def ask(
    names: Sequence[str], options: Mapping[str, Mapping[str, Any]], split: Split, seeds: range, read: Read, encode: Encode
) -> list[Asked]:  # fmt: skip
    """Questions of each environment, one for each seed; `options` are the environments' difficulty. Held-out questions in text
    are all different: seeds that ask one again are passed over for later ones, as long as there are others."""
    found = []
    for name in names:
        environment, known, mine = make(name, **options.get(name, {})), set[str](), list[Asked]()
        for seed in range(seeds.start, seeds.start + PATIENCE * len(seeds)):
            if len(mine) == len(seeds):
                break
            observation, info = environment.reset(seed=seed, options={"split": split})
            last = seed - seeds.start >= (PATIENCE - 1) * len(seeds)
            if split == "test" and isinstance(observation, str) and observation in known and not last:
                continue
            known.add(observation if isinstance(observation, str) else "")
            mine.append(Asked(name, split, seed, read(name, observation), encode(info["trace"])))
        found += mine
    return found


class Judge:
    """The verifier: an environment of each kind, asked again and answered."""

    def __init__(self, options: Mapping[str, Mapping[str, Any]]) -> None:
        self.options = options
        self.environments: dict[str, SingleTurn] = {}

    def reward(self, asked: Asked, text: str) -> float:
        """What an answer earns."""
        if asked.name not in self.environments:
            self.environments[asked.name] = make(asked.name, **self.options.get(asked.name, {}))
        environment = self.environments[asked.name]
        environment.reset(seed=asked.seed, options={"split": asked.split})
        return float(environment.step(text)[1])
