"""What the environments have in common: a question, an answer in text, a reward of 1 or 0.

Notable choices
- An episode is one question and one answer. The action is text; what it must say is not in the observation, and `judge` decides
  it by a rule, without a model: the reward is verifiable.
- The question is a function of the seed, the split and the difficulty. Held-out questions (`split` test) are of other digits,
  other sums or other draws than those of training, as each environment tells.
- `info["trace"]` after `reset` is a reference way to the answer, whose last word is the answer, for a supervised warm start and
  for hints (AHRL). `info["answer"]` is what `judge` compares with. An agent that is to be trusted is not shown either.
"""

from __future__ import annotations

import string
from abc import ABC, abstractmethod
from copy import deepcopy
from typing import Any, Literal, NamedTuple

import gymnasium
import numpy as np
from gymnasium import spaces

Split = Literal["train", "test"]
CHARACTERS = frozenset(string.ascii_lowercase + string.digits + " ,.?+=")
LONGEST = 64


class Question(NamedTuple):
    """What is shown, and a way to the answer: words, the last of which (or all, see `SingleTurn.whole`) are the answer."""

    observation: Any
    trace: str


class SingleTurn(gymnasium.Env[Any, str], ABC):  # type: ignore[misc]
    """One question, one answer.

    Args:
        split: train or test, for resets without the option `split`.
        render_mode: `ansi` makes `render` tell the question in words.

    Raises:
        ValueError: there is no such split.
    """

    metadata = {"render_modes": ["ansi"], "render_fps": 1}  # noqa: RUF012 - gymnasium's own declaration
    whole = False
    """Whether the whole trace is the answer, not its last word only."""

    def __init__(self, split: Split = "train", render_mode: str | None = None) -> None:
        self.split: Split = _known(split)
        self.render_mode = render_mode
        self.action_space = spaces.Text(LONGEST, min_length=0, charset=CHARACTERS)
        self.question: Question | None = None
        self.open = False

    @abstractmethod
    def draw(self, rng: np.random.Generator, split: Split) -> Question:
        """A question of a split."""

    @property
    def answer(self) -> str:
        """What the current question's answer must say."""
        return _last(self._asked().trace, self.whole)

    def judge(self, text: str) -> float:
        """1 if a text says the answer, else 0: its last word must, or all its words where `whole`."""
        return float(_last(text, self.whole) == self.answer)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Ask a new question; `options["split"]` chooses between train and test.

        Raises:
            ValueError: there is no such split.
        """
        super().reset(seed=seed)
        split = _known((options or {}).get("split", self.split))
        own = np.random.default_rng(
            [int(self.np_random.integers(2**62)), int(split == "test")]
        )  # splits share no layout
        self.question = self.draw(own, split)
        self.open = True
        return deepcopy(self.question.observation), {"answer": self.answer, "trace": self.question.trace}

    def step(self, action: str) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Judge an answer; the episode ends.

        Raises:
            RuntimeError: the question has been answered already, or there is none yet.
        """
        asked = self._asked()
        if not self.open:
            raise RuntimeError("the question has been answered; reset() asks the next one")
        self.open = False
        reward = self.judge(action)
        return deepcopy(asked.observation), reward, True, False, {"answer": self.answer, "success": reward == 1}

    def render(self) -> str | None:
        """The question in words, where render_mode is `ansi`."""
        return self.told() if self.render_mode == "ansi" else None

    def told(self) -> str:
        """The question in words."""
        return str(self._asked().observation)

    def _asked(self) -> Question:
        if self.question is None:
            raise RuntimeError("there is no question yet; reset() asks the first one")
        return self.question


def _last(text: str, whole: bool) -> str:
    words = text.split()
    return " ".join(words) if whole else (words[-1] if words else "")


def _known(split: Any) -> Split:
    if split not in ("train", "test"):
        raise ValueError(f"split: got {split!r}; expected train or test")
    return "test" if split == "test" else "train"
