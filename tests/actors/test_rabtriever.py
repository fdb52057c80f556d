"""Teachers as Ray actors: their number, their deaths and where training runs change no bit."""

from __future__ import annotations

import json
import os
import signal
from typing import Any

import numpy as np
import pytest
import ray
import torch

from actors import teacher as module
from actors.teacher import Teachers
from jobs import rabtriever
from raysys.runtime.run import Run
from raysys.runtime.sentences import UserError
from raysys.runtime.session import ClusterConfig, Session
from raysys.runtime.storage import Storage
from raysys.systems.rabtriever.artifact import FOLDER, save_teacher
from raysys.systems.rabtriever.reader import make_backbone, make_reader
from raysys.systems.rabtriever.setting import TeacherSetting
from raysys.systems.rabtriever.targets import LocalTargets
from raysys.systems.rabtriever.teacher import Reranker

SETTING = TeacherSetting(width=32, layers=1, units="chunks")
DOCUMENTS = [
    f"take the {thing} to the {place}"
    for thing in ("lamp", "rope", "kettle", "map")
    for place in ("pier", "barn", "hill")
]
QUERIES = [f"what now, {name} is lost near the water and night falls" for name in ("ann", "bob", "cyd", "dan", "eve")]


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A teacher with random weights in a run's folder, the parts, and its answers in this process."""
    torch.set_num_threads(1)
    storage = Storage(tmp_path_factory.mktemp("teacher"))
    reader = make_reader(SETTING)
    backbone = make_backbone(SETTING, reader, 3)
    save_teacher(storage, SETTING, backbone, reader)
    documents, queries = reader.documents(DOCUMENTS), reader.queries(QUERIES)
    reranker = Reranker(backbone)
    pairs = np.stack(np.meshgrid(np.arange(5), np.arange(12), indexing="ij"), -1).reshape(-1, 2)
    return storage, documents, queries, pairs, reranker, LocalTargets(reranker, documents, queries).take(pairs)


def spawn(taught: Any, count: int) -> Teachers:
    storage, documents, queries = taught[:3]
    session = Session(ClusterConfig())
    return Teachers.spawn(session, storage, documents, queries, SETTING.width, count=count, cpus=0.5, gpus=0.0)


def test_any_number_of_teachers_answers_with_the_bits_of_one_in_this_process(ray_cluster: Any, taught: Any) -> None:
    _, documents, queries, pairs, reranker, expected = taught
    order = np.random.default_rng(0).permutation(len(pairs))
    for count in (1, 2):
        teachers = spawn(taught, count)
        asked = [teachers.ask(pairs[part]) for part in np.array_split(order, 7)]
        answered = torch.cat([teachers.take(one) for one in asked])
        assert torch.equal(answered, expected[torch.from_numpy(order)])
        assert torch.equal(teachers.document_states(), reranker.documents(documents))
        assert torch.equal(teachers.query_states(), reranker.queries(queries))
        told = teachers.telemetry()
        assert sum(one["pairs"] for one in told) == sum(one["read"] for one in told) == len(pairs)
        teachers.stop()


def test_a_pair_is_read_once_however_often_it_is_asked_for(ray_cluster: Any, taught: Any) -> None:
    teachers, pairs = spawn(taught, 1), taught[3]
    for _ in range(3):
        assert torch.equal(teachers.take(teachers.ask(pairs[:20])), taught[5][:20])
    assert teachers.telemetry()[0]["read"] == 20
    assert teachers.telemetry()[0]["pairs"] == 60
    teachers.stop()


def test_a_teacher_that_is_killed_is_replaced_and_what_was_asked_of_it_is_answered(
    ray_cluster: Any, taught: Any
) -> None:
    teachers, pairs = spawn(taught, 2), taught[3]
    teachers.take(teachers.ask(pairs[:4]))
    before = [int(one["pid"]) for one in teachers.telemetry()]
    asked = [teachers.ask(part) for part in np.array_split(pairs, 5)]
    os.kill(before[1], signal.SIGKILL)
    answered = torch.cat([teachers.take(one) for one in asked])
    assert torch.equal(answered, taught[5])
    after = [int(one["pid"]) for one in teachers.telemetry()]
    assert after[0] == before[0]
    assert after[1] != before[1]
    teachers.stop()


def settings(tmp_path: Any, **changes: Any) -> rabtriever.TrainConfig:
    values: dict[str, Any] = {
        "data": "rationale(train=200,test=60)", "out": str(tmp_path), "wandb": False,
        "teacher": {"width": 32, "layers": 1, "steps": 6, "batch": 16}, "cpus_per_teacher": 0.5,
        "student": {"steps": 12, "batch": 16, "rollout": "onpolicy", "refresh": 5, "hidden": 16},
        "train": {"checkpoint_every": 4, "cpus_per_worker": 0.5},
    }  # fmt: skip
    return rabtriever.TrainConfig.of(values | changes)


def trained(config: rabtriever.TrainConfig, session: Session) -> tuple[bytes, bytes, dict[str, Any]]:
    """The weights of both halves, and the results."""
    with Run.open(config, system="rabtriever", command="train") as run:
        rabtriever.train(config, run, session)
        weights = [run.storage.read_bytes(f"{FOLDER}/{name}.safetensors") for name in ("backbone", "predictor")]
        result = run.stage("seed0/measured").result
    assert result is not None
    return weights[0], weights[1], json.loads(json.dumps({k: v for k, v in result.items() if k != "teachers"}))


@pytest.mark.slow
def test_workers_and_teachers_give_the_bits_of_one_process_even_when_one_is_killed(
    ray_cluster: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(ClusterConfig())
    alone = trained(settings(tmp_path, execution="inprocess"), session)
    spread = settings(tmp_path, teachers=2, train={"workers": 2, "checkpoint_every": 4, "cpus_per_worker": 0.5})
    spawned = Teachers.spawn.__func__  # type: ignore[attr-defined]

    def hurt(cls: type[Teachers], *args: Any, **kwargs: Any) -> Teachers:
        """Teachers of which one dies as soon as it has started."""
        made = spawned(cls, *args, **kwargs)
        pid = int(ray.get(made.handles[1].telemetry.remote())["pid"])
        os.kill(pid, signal.SIGKILL)
        return made

    monkeypatch.setattr(module.Teachers, "spawn", classmethod(hurt))
    assert trained(spread, session) == alone


def test_more_teachers_than_the_machine_holds_are_refused(ray_cluster: Any, taught: Any) -> None:
    session = Session(ClusterConfig())
    session.embedded = True
    storage, documents, queries = taught[:3]
    with pytest.raises(UserError, match="teachers: got 100000 of 1 CPUs"):
        Teachers.spawn(session, storage, documents, queries, 32, count=100_000, cpus=1.0, gpus=0.0)
