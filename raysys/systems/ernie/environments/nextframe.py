"""`NextFrame-v0`: a digit moves; which of the candidates is its next frame? Answer "right 2": where to, and then which, from 1.

Wrong candidates show the same digit elsewhere, so that the motion must be seen and not the digit known: at least half a digit
off or, harder, where it would be had it turned. Only the last word, the number, counts. Held-out clips show held-out handwriting
(index % 5 == 0).
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
        turns: wrong candidates are the next frames of a digit that turns, off by two pixels or four.

    Raises:
        ValueError: one of these cannot be.
    """

    def __init__(
        self, split: Split = "train", candidates: int = 2, frames: int = 3, size: int = 16, turns: bool = False,
        render_mode: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(split, render_mode)
        self.speed = (size - SIDE) // max(1, frames)
        if not 2 <= candidates <= len(DIRECTIONS) or frames < 2 or self.speed < 1:
            raise ValueError(
                f"nextframe: got {candidates} candidates after {frames} frames of {size} pixels; expected 2 to"
                f" {len(DIRECTIONS)} candidates, 2 or more frames, and a pixel of room for each beside a digit's {SIDE}"
            )
        self.candidates, self.frames, self.size, self.turns = candidates, frames, size, turns

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
        end = path[-1] + self.speed * np.array(STEPS[way])
        wrong = self._turned(path[-1], way, rng) if self.turns else self._elsewhere(end, rng)
        ends = [end, *wrong][: self.candidates]
        shown = rng.permutation(self.candidates)
        return Question(
            {
                "frames": np.stack([self._frame(picture, place) for place in path]),
                "candidates": np.stack([self._frame(picture, ends[i]) for i in shown]),
            },
            f"{DIRECTIONS[way]} {int(np.flatnonzero(shown == 0)[0]) + 1}",
        )

    def _turned(self, last: np.ndarray, way: int, rng: np.random.Generator) -> list[np.ndarray]:
        """Where the digit would be, had it turned after `last`."""
        others = rng.permutation([w for w in range(len(DIRECTIONS)) if w != way])
        return [last + self.speed * np.array(STEPS[w]) for w in others]

    def _elsewhere(self, end: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
        """Places at least half a digit from the right one and from each other."""
        room, found = self.size - SIDE, [end]
        free = [np.array((i, j)) for i in range(room + 1) for j in range(room + 1)]
        while len(found) < self.candidates:
            free = [place for place in free if np.abs(place - found[-1]).max() >= SIDE // 2]
            found.append(free[rng.integers(len(free))])
        return found[1:]

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
