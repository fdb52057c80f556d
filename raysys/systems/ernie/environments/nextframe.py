"""`NextFrame-v0`: a digit moves; which of the candidates is its next frame? Answer "right 2": where to, and then which, from 1.

Wrong candidates show the same digit where it would be had it turned: so the motion must be seen, not the digit known. Only the
last word, the number, counts. Held-out clips show held-out handwriting (index % 5 == 0).
"""

from __future__ import annotations

import numpy as np
from gymnasium import spaces

from raysys.data.multimodal_embedded import DIRECTIONS, SIDE, chosen, digits
from raysys.systems.ernie.environments.question import Question, SingleTurn, Split

STEPS = ((0, -1), (0, 1), (-1, 0), (1, 0))
"""Down and right per frame of each direction."""


class NextFrame(SingleTurn):
    """Choose the frame that comes next.

    Args:
        candidates: 2 to 4.
        frames: how many are shown, 2 or more.
        size: height and width.

    Raises:
        ValueError: one of these cannot be.
    """

    def __init__(
        self, split: Split = "train", candidates: int = 3, frames: int = 3, size: int = 16, render_mode: str | None = None
    ) -> None:  # fmt: skip
        super().__init__(split, render_mode)
        self.speed = (size - SIDE) // max(1, frames)
        if not 2 <= candidates <= len(DIRECTIONS) or frames < 2 or self.speed < 1:
            raise ValueError(
                f"nextframe: got {candidates} candidates after {frames} frames of {size} pixels; expected 2 to"
                f" {len(DIRECTIONS)} candidates, 2 or more frames, and a pixel of room for each beside a digit's {SIDE}"
            )
        self.candidates, self.frames, self.size = candidates, frames, size

        def box(count: int) -> spaces.Box:
            return spaces.Box(0.0, 1.0, (count, 1, size, size), np.float32)

        self.observation_space = spaces.Dict({"frames": box(frames), "candidates": box(candidates)})

    def draw(self, rng: np.random.Generator, split: Split) -> Question:
        which = chosen(split == "test")
        picture = digits()[0][int(which[rng.integers(len(which))])]
        way = int(rng.integers(len(DIRECTIONS)))
        room = self.size - SIDE
        at = rng.integers(self.speed, room - self.speed + 1, size=2)  # so that a turn does not leave the canvas
        axis = 0 if STEPS[way][0] else 1
        span = self.speed * self.frames  # from the first frame to the one asked for
        first = int(rng.integers(room - span + 1))
        at[axis] = first if sum(STEPS[way]) > 0 else room - first
        path = [at + self.speed * t * np.array(STEPS[way]) for t in range(self.frames)]
        order = [way, *(int(w) for w in rng.permutation([w for w in range(len(DIRECTIONS)) if w != way]))]
        shown = [order[i] for i in rng.permutation(self.candidates)]
        ends = [path[-1] + self.speed * np.array(STEPS[w]) for w in shown]
        return Question(
            {
                "frames": np.stack([self._frame(picture, place) for place in path]),
                "candidates": np.stack([self._frame(picture, place) for place in ends]),
            },
            f"{DIRECTIONS[way]} {shown.index(way) + 1}",
        )

    def _frame(self, picture: np.ndarray, place: np.ndarray) -> np.ndarray:
        """(1, size, size): the digit at a place."""
        frame = np.zeros((1, self.size, self.size), np.float32)
        top, left = map(int, place)
        frame[0, top : top + SIDE, left : left + SIDE] = picture
        return frame

    def told(self) -> str:
        shown = self._asked().observation
        rows = []
        for frames in (shown["frames"], shown["candidates"]):
            lines = [["".join(" .:*#"[min(4, int(5 * v))] for v in row) for row in frame[0]] for frame in frames]
            rows += [" | ".join(parts) for parts in zip(*lines, strict=True)] + [""]
        return "\n".join(rows)
