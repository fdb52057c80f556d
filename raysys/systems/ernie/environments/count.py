"""`CountDigits-v0`: how many handwritten digits are in an image, or how many of one kind.

The answer is a number in figures. The reference trace reads the digits first, row by row: "three five 2"; asked for one kind, it
reads all of them too. Held-out images are made of held-out handwriting (scikit-learn's digits with index % 5 == 0).
"""

from __future__ import annotations

import numpy as np
from gymnasium import spaces

from raysys.data.multimodal_embedded import NAMES, PLACES, SIDE, chosen, digits
from raysys.systems.ernie.environments.question import CHARACTERS, Question, SingleTurn, Split

FULL = 0.6
"""Probability that a place holds a digit."""


class CountDigits(SingleTurn):
    """Count what is in the four quadrants of a canvas.

    Args:
        kinds: 0 asks for all digits; m asks for one of m kinds of digits, and only these occur.
        size: height and width of the canvas.

    Raises:
        ValueError: kinds is 1 or above 10, or the canvas is too small.
    """

    def __init__(self, split: Split = "train", kinds: int = 0, size: int = 16, render_mode: str | None = None) -> None:
        super().__init__(split, render_mode)
        if kinds == 1 or not 0 <= kinds <= len(NAMES) or size < 2 * SIDE:
            raise ValueError(
                f"count: got {kinds} kinds on {size} pixels; expected 0 or 2 to 10 kinds, {2 * SIDE} or more"
            )
        self.kinds, self.size = kinds, size
        self.observation_space = spaces.Dict(
            {
                "question": spaces.Text(16, min_length=1, charset=CHARACTERS),
                "image": spaces.Box(0.0, 1.0, (1, size, size), np.float32),
            }
        )

    def draw(self, rng: np.random.Generator, split: Split) -> Question:
        pictures, labels = digits()
        which = chosen(split == "test")
        which = which[labels[which] < (self.kinds or len(NAMES))]
        image = np.zeros((1, self.size, self.size), np.float32)
        found = []
        for place in np.flatnonzero(rng.random(len(PLACES)) < FULL):
            digit = int(which[rng.integers(len(which))])
            top, left = (place // 2) * (self.size - SIDE), (place % 2) * (self.size - SIDE)
            image[0, top : top + SIDE, left : left + SIDE] = pictures[digit]
            found.append(int(labels[digit]))
        asked = int(rng.integers(self.kinds)) if self.kinds else None
        count = len(found) if asked is None else found.count(asked)
        question = "how many?" if asked is None else f"how many {NAMES[asked]}?"
        trace = " ".join([*(NAMES[value] for value in found), str(count)])
        return Question({"question": question, "image": image}, trace)

    def told(self) -> str:
        shown = self._asked().observation
        lines = ["".join(" .:*#"[min(4, int(5 * v))] for v in row) for row in shown["image"][0]]
        return "\n".join([shown["question"], *lines])
