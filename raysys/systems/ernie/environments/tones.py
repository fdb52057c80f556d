"""`Tones-v0`: transcribe tones that follow each other, "low rising high steady".

Each tone is low or high, and rising, steady or falling, as in `raysys.data.multimodal_embedded`; frequency, phase and noise are
drawn anew each time. The whole transcription must be right. Held out are other draws: there are 6^n transcriptions only.
"""

from __future__ import annotations

import numpy as np
from gymnasium import spaces

from raysys.data.multimodal import Form
from raysys.data.multimodal_embedded import REGISTERS, SHAPES, SPREAD, tone
from raysys.systems.ernie.environments.question import Question, SingleTurn, Split


class Tones(SingleTurn):
    """Write down a number of tones.

    Args:
        tones: how many.
        form: samples and rate of a tone.

    Raises:
        ValueError: there are none.
    """

    whole = True

    def __init__(
        self, split: Split = "train", tones: int = 2, form: Form | None = None, render_mode: str | None = None
    ) -> None:
        super().__init__(split, render_mode)
        if tones < 1:
            raise ValueError(f"tones: got {tones}; expected 1 or more")
        self.tones, self.form = tones, form or Form()
        self.observation_space = spaces.Box(-1.0, 1.0, (tones * self.form.samples,), np.float32)

    def draw(self, rng: np.random.Generator, split: Split) -> Question:
        words, waves = list[str](), []
        for _ in range(self.tones):
            register = tuple(REGISTERS)[int(rng.integers(len(REGISTERS)))]
            shape = tuple(SHAPES)[int(rng.integers(len(SHAPES)))]
            frequency = REGISTERS[register] * rng.uniform(1 - SPREAD, 1 + SPREAD)
            waves.append(tone(self.form, frequency, SHAPES[shape], rng))
            words += [register, shape]
        return Question(np.clip(np.concatenate(waves), -1, 1), " ".join(words))

    def told(self) -> str:
        wave = self._asked().observation
        return f"{len(wave)} samples at {self.form.rate} per second, {self.tones} tones"
