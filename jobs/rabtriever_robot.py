"""A robot that acts by retrieval: in `SkillRetrieval-v0` an instruction is met by finding the next skill, again and again.

Every retriever plays the same errands, once among the skills that can be done now (an external feasibility check, as SayCan has
one) and once without that check. A retrieval score is no measure of safety: the environment, not the retriever, refuses what
cannot be done.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from pydantic import Field

from jobs.cli import ClusterJob
from raysys.nn.encoder import TextEncoder
from raysys.nn.pretrained import MINILM, load_base
from raysys.runtime.run import Run
from raysys.runtime.seeds import Seeds, Stream
from raysys.runtime.session import Session
from raysys.runtime.statistics import bootstrap
from raysys.systems.rabtriever import claims
from raysys.systems.rabtriever.artifact import Retriever
from raysys.systems.rabtriever.environment import SkillRetrieval, success_rate
from raysys.systems.rabtriever.task import trained_on

Score = Callable[[list[str]], np.ndarray]


class RobotConfig(ClusterJob):
    """Success of a run's retriever in SkillRetrieval-v0, beside its teacher, BM25, the frozen encoder and chance."""

    run: str = ""
    """Run folder (path or URI) that `train --data skills` (or SayCan's folder) made."""
    data: str = ""
    """skills, skills(...), or a folder with SayCan's plans; by default what the run was trained on."""
    episodes: int = Field(100, ge=1)
    """Errands played by each retriever at most; each is played once."""

    @property
    def distributed(self) -> bool:
        return False

    def check(self) -> None:
        if not self.run:
            raise ValueError("run: is missing; expected the folder of a run that train --data skills made")
        SkillRetrieval(trained_on(Retriever.load(self.run).told.data, self.data))


def robot(config: RobotConfig, run: Run, session: Session) -> None:
    """Every retriever on the same errands."""
    torch.set_num_threads(1)
    retriever = Retriever.load(config.run)
    source = trained_on(retriever.told.data, config.data)
    world = SkillRetrieval(source)
    played = min(
        config.episodes, len(world.errands)
    )  # what happens in an errand is certain: again would tell nothing new
    skills = [skill.text for skill in world.skills]
    rows = []
    for name, score in scorers(retriever, skills, config.seed).items():
        line: dict[str, Any] = {"retriever": name}
        for label, allow in (("among feasible skills", True), ("among all skills", False)):
            met = success_rate(score, played, config.seed, world, allow)
            found = bootstrap(met, lambda sample: float(sample.mean()), Seeds(config.seed).rng(Stream.SHUFFLE))
            run.row("success rate", found, method=name, data=source, skills=label)
            line[f"success {label} (%)"] = claims.percent(found)
        rows.append(line)
    run.grid(f"{source}: {played} errands over {len(skills)} skills, 95 % bootstrap over errands", rows)


def scorers(retriever: Retriever, skills: list[str], seed: int) -> dict[str, Score]:
    """Observations (n texts) to scores (n, m) of the skills, by name of the retriever."""
    import bm25s

    z = retriever.documents(skills)
    encoder = TextEncoder(load_base(MINILM))
    dense = encoder.encode(skills)
    words = partial(bm25s.tokenize, stopwords=None, return_ids=False, show_progress=False)
    lexical = bm25s.BM25()
    lexical.index(words(skills), show_progress=False)
    drawn = Seeds(seed).rng(Stream.ATTACK)

    def student(texts: list[str]) -> np.ndarray:
        u, c = retriever.queries(texts)
        return u @ z.T + c[:, None]

    return {
        "student": student,
        "teacher": lambda texts: np.stack([retriever.rerank(text, skills) for text in texts]),
        "dense": lambda texts: (encoder.encode(texts) @ dense.T).numpy(),
        "bm25": lambda texts: np.stack([lexical.get_scores(one) for one in words(texts)]).astype(np.float32),
        "random": lambda texts: drawn.random((len(texts), len(skills)), dtype=np.float32),
    }
