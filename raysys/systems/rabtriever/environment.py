"""A robot that is told its next skill by a retriever: the gymnasium environment `SkillRetrieval-v0`.

Shapes: m skills, n observations.

Notable choices
- An observation is a text, the instruction and the steps so far, which is what the retriever is asked; an action is the
  number of a skill in the pool. The world itself (raysys.data.skills) is exact and is not shown.
- Ranking first does not make a skill possible: what cannot be done is refused, costs `PENALTY` and changes nothing but the time
  left (spec section 8: never carry out the first hit blindly). `info["feasible"]` is the allow-list of the moment.
- An episode ends with the skill `done`: the reward is 1 if the instruction is met and 0 if not; or, truncated, at the time limit.
- Instructions are those of the test split: none of them is trained on. `queries_of` gives the data to train on.
"""

from __future__ import annotations

import copy
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from raysys.data.datasets import DataError
from raysys.data.plans import held_out_instructions, progress
from raysys.data.retrieval import Retrieval, generator, load_retrieval
from raysys.data.skills import Errand, Skill, Skills, World, pool, shown_errands
from raysys.runtime.seeds import Seeds, Stream

ID = "SkillRetrieval-v0"
PLANS = "saycan_plan_v0_l.tsv"
PENALTY = 0.05
LIMIT = 30

Score = Callable[[list[str]], NDArray[np.float32]]


class SkillRetrieval(gymnasium.Env[str, np.int64]):  # type: ignore[misc]
    """One instruction an episode, carried out skill by skill.

    Args:
        source: `skills` or `skills(option=value, ...)` for the generated household, or a folder with SayCan's plans.
        limit: steps until an episode is cut off.
        render_mode: `ansi` makes `render` return the observation.

    Raises:
        ValueError: limit is below 1; DataError, one of them: there are no such instructions.
    """

    metadata = {"render_modes": ["ansi"], "render_fps": 1}  # noqa: RUF012 - gymnasium's own declaration

    def __init__(self, source: str = "skills", limit: int = LIMIT, render_mode: str | None = None) -> None:
        if limit < 1:
            raise ValueError(f"limit: got {limit}; it must be at least 1")
        self.source, self.limit, self.render_mode = source, limit, render_mode
        self.errands, texts = read_errands(source)
        self.skills = tuple(Skill.of(text) for text in texts)
        longest = max(len(errand.text) for errand in self.errands)
        letters = set("".join((*texts, *(errand.text for errand in self.errands)))) | set(string.ascii_letters + " :,;")
        most = len(progress("", ["", ""])) + longest + limit * (2 + max(map(len, texts)))
        self.observation_space = spaces.Text(most, min_length=1, charset=frozenset(letters))
        self.action_space = spaces.Discrete(len(self.skills))
        self.errand, self.world, self.steps, self.time = self.errands[0], World(), [""], 0
        self._begin(self.errand)

    def _begin(self, errand: Errand) -> None:
        self.errand, self.world, self.steps, self.time = errand, errand.start(), [], 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Begin the errand `options["errand"]` (its number), or one drawn at random.

        Raises:
            ValueError: there is no errand of that number.
        """
        super().reset(seed=seed)
        asked = (options or {}).get("errand")
        number = int(self.np_random.integers(len(self.errands)) if asked is None else asked)
        if not 0 <= number < len(self.errands):
            raise ValueError(f"errand: got {number}; there are {len(self.errands)}, counted from 0")
        self._begin(self.errands[number])
        return self.observation(), self._info("")

    def step(self, action: np.int64 | int) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Do a skill, or refuse it with its reason in `info["refused"]`."""
        skill = self.skills[int(action)]
        self.time += 1
        refused = self.world.refusal(skill)
        if refused:
            return self.observation(), -PENALTY, False, self.time >= self.limit, self._info(refused)
        self.world.do(skill)
        self.steps.append(skill.text)
        done = self.world.finished
        met = done and self.errand.met(self.world)
        return self.observation(), float(met), done, not done and self.time >= self.limit, self._info("")

    def observation(self) -> str:
        """The instruction and the steps so far."""
        return progress(self.errand.text, self.steps)

    def feasible(self) -> NDArray[np.bool_]:
        """(m,) which skills can be done now."""
        return np.array([not self.world.refusal(skill) for skill in self.skills])

    def _info(self, refused: str) -> dict[str, Any]:
        met = self.world.finished and self.errand.met(self.world)
        return {"feasible": self.feasible(), "refused": refused, "success": met}

    def render(self) -> str | None:
        """The observation, where render_mode is `ansi`."""
        return self.observation() if self.render_mode == "ansi" else None


def read_errands(source: str) -> tuple[list[Errand], tuple[str, ...]]:
    """The test instructions of a source and the texts of all its skills.

    Raises:
        DataError: there is no such source.
    """
    file = Path(source).expanduser() / PLANS
    if file.is_file():
        errands = shown_errands(file)
        held = held_out_instructions([errand.text for errand in errands])
        skills = tuple(sorted({text for errand in errands for text in errand.shown}))
        return [errand for errand in errands if errand.text in held], skills
    task = generator(source)
    if not isinstance(task, Skills):
        raise DataError(f"data: got {source!r}; expected skills, skills(...) or a folder with {PLANS}")
    return task.errands("test"), pool()


def register() -> None:
    """Make the environment known to gymnasium.make as `SkillRetrieval-v0`; again does nothing."""
    if ID not in gymnasium.registry:
        gymnasium.register(ID, entry_point=f"{SkillRetrieval.__module__}:{SkillRetrieval.__name__}")


def queries_of(env: SkillRetrieval) -> Retrieval:
    """What to train on for an environment: observations on the way of its plans, and the next skill as the right document.

    The documents are the environment's skills in the order of its actions; its own instructions are the test split.
    """
    data = load_retrieval(env.source)
    if data.documents != tuple(skill.text for skill in env.skills):
        raise RuntimeError(f"the documents of {env.source!r} are not the skills of its environment")
    return data


def success_rate(
    score: Score, episodes: int, seed: int, env: SkillRetrieval | None = None, allow: bool = True
) -> NDArray[np.float64]:
    """(min(episodes, errands),) 1 where the instruction was met within the time limit, else 0.

    Args:
        score: observations (n texts) to scores (n, m), larger is better; ties go to the first skill.
        episodes: how many errands at most, each once: an errand begins and goes on alike every time, so a repetition would only
            feign more of them.
        seed: which errands, and in which order.
        env: where, by default the generated household; its own state stays as it is.
        allow: choose among the skills that can be done, as SayCan does; else a refused one is tried until time is up.

    Raises:
        ValueError: episodes is below 1, or the scores have another shape.
    """
    if episodes < 1:
        raise ValueError(f"episodes: got {episodes}; it must be at least 1")
    first = env or SkillRetrieval()
    order = Seeds(seed).rng(Stream.SHUFFLE).permutation(len(first.errands))[:episodes]
    worlds = [copy.copy(first) for _ in order]
    for world, number in zip(worlds, order, strict=True):
        world.reset(options={"errand": int(number)})  # gives it a world of its own
    met, running = np.zeros(len(order)), list(range(len(order)))
    while running:
        scores = score([worlds[i].observation() for i in running])
        if scores.shape != (len(running), len(first.skills)):
            raise ValueError(f"score: got shape {scores.shape}; expected ({len(running)}, {len(first.skills)})")
        left = []
        for i, row in zip(running, scores, strict=True):
            chosen = np.where(worlds[i].feasible(), row, -np.inf) if allow else row
            _, reward, done, late, _ = worlds[i].step(int(np.argmax(chosen)))
            met[i] = reward == 1
            left += [] if done or late else [i]
        running = left
    return met
