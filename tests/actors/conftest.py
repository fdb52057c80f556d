"""Training runs as tests want them: from values to final parameters, with a way to hurt the run at a chosen round."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import ray

from jobs.byzantine import TrainConfig, train_once
from raysys.runtime.checkpoint import read_state
from raysys.runtime.progress import Progress
from raysys.runtime.rounds import Rounds
from raysys.runtime.run import Run
from raysys.runtime.session import Session

IDLE: dict[str, list[Any]] = {}
"""Processes that earlier tests have left. Starting one costs seconds, so tests hand them on as the runs of a job do."""
BASE = {"rounds": 24, "workers": 20, "byzantine": 4, "block": 4, "batch": 8, "wandb": False, "log_every": 6, "seeds": 1}


@dataclass
class Trained:
    model: np.ndarray
    result: dict[str, Any]
    events: list[dict[str, Any]]


def end_idle() -> None:
    """Free the resources that idle processes hold."""
    while IDLE:
        for process in IDLE.popitem()[1]:
            ray.kill(process)


@pytest.fixture(scope="module", autouse=True)
def leave_no_process() -> Iterator[None]:
    """What idle processes hold would starve the tests of other folders."""
    yield
    end_idle()


@pytest.fixture
def free_all() -> Callable[[], None]:
    """Ends idle processes, for tests that need every CPU."""
    return end_idle


@pytest.fixture
def train(ray_cluster, tmp_path, monkeypatch) -> Callable[..., Trained]:
    """train(hurt=(round, function of the Rounds), cluster={...}, **settings) -> Trained. One session keeps its processes."""
    original = Rounds.due

    def run(
        hurt: tuple[int, Callable[[Rounds], None]] | None = None, cluster: dict | None = None, **values: Any
    ) -> Trained:
        cluster = {"hosts": 2, "cpus_per_host": 0.5, "snapshot_every": 8, "timeout_s": 60.0, **(cluster or {})}
        config = TrainConfig.of({**BASE, "out": str(tmp_path), "cluster": cluster, **values})
        done = []

        def due(self: Rounds, t: int) -> bool:
            if hurt is not None and t == hurt[0] and not done:
                done.append(t)
                hurt[1](self)
            return original(self, t)

        monkeypatch.setattr(Rounds, "due", due)
        _, setting = config.arms()["robust"]
        with Session(config.cluster) as session, Run.open(config, system="byzantine", command="train") as folder:
            session.idle = IDLE
            stage = folder.stage("only")
            with Progress(config.rounds, "test") as progress:
                train_once(config, setting, 3, stage, session, progress)
            state, _ = read_state(folder.storage, f"{stage.folder}/model.safetensors")
            assert hurt is None or done
            return Trained(state["model"], stage.result, folder.events())

    return run
