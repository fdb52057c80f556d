"""`Arithmetic-v0`: a sum in text, "3+8+5=", to be answered "11 16": the running sums, the last of which counts.

Held out is one sum of five, by a hash of its numbers, the first two in order of size: no held-out sum is ever asked in training,
nor the one with its first two numbers exchanged, which has the same running sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from zlib import crc32

import numpy as np
from gymnasium import spaces

from raysys.systems.ernie.environments.question import CHARACTERS, Question, SingleTurn, Split

EVERY = 5


class Arithmetic(SingleTurn):
    """Add numbers.

    Args:
        terms: how many numbers, 2 or more.
        below: numbers are 0 to below - 1.

    Raises:
        ValueError: terms is below 2, or below is below 4 (so that both splits have sums).
    """

    def __init__(self, split: Split = "train", terms: int = 2, below: int = 10, render_mode: str | None = None) -> None:
        super().__init__(split, render_mode)
        if terms < 2 or below < 4:
            raise ValueError(f"arithmetic: got {terms} terms below {below}; expected 2 or more terms below 4 or more")
        self.terms, self.below = terms, below
        self.observation_space = spaces.Text(
            terms * (len(str(below - 1)) + 1), min_length=2 * terms, charset=CHARACTERS
        )

    def draw(self, rng: np.random.Generator, split: Split) -> Question:
        while True:
            terms = rng.integers(self.below, size=self.terms).tolist()
            text = "+".join(map(str, terms)) + "="
            if held_out(terms) == (split == "test"):
                return Question(text, " ".join(map(str, list(accumulate(terms))[1:])))


def held_out(terms: Sequence[int]) -> bool:
    """Whether the sum of these numbers is one of the test split."""
    return crc32("+".join(map(str, [*sorted(terms[:2]), *terms[2:]])).encode()) % EVERY == 0
