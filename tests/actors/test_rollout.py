"""Rollout actors: their number, their deaths and where answers are drawn change no bit."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "systems" / "ernie"))

import policies_for_tests as p

from actors.rollout import Rollers
from raysys.runtime.sentences import UserError
from raysys.runtime.session import ClusterConfig, Session
from raysys.systems.ernie.rl.loop import Loop
from raysys.systems.ernie.rl.questions import Questions
from raysys.systems.ernie.rl.rollout import Worker
from raysys.systems.ernie.rl.setting import RLSetting

SETTING = p.setting(buffer={"batch": 4, "group": 2, "depth": 3, "slots": 6, "calls": 1}, mismatch="bf16")


@pytest.fixture(scope="module", autouse=True)
def by_value() -> Iterator[None]:
    """Workers cannot import this folder's modules."""
    ray.cloudpickle.register_pickle_by_value(p)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    ray.cloudpickle.unregister_pickle_by_value(p)
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def made(setting: RLSetting, questions: Questions) -> Worker:
    return Worker(p.Tabular(8), questions, p.FirstWord(), p.decode, setting, 0)  # type: ignore[arg-type]


def spawn(count: int) -> Rollers:
    return Rollers.spawn(None, made, (SETTING, ray.put(p.questions())), count=count, cpus=0.25)


def trained(hands: Any, hurt: Any = None) -> tuple[dict[str, bytes], list[dict[str, float]]]:
    loop = Loop(p.Tabular(8), hands, p.questions(), SETTING)  # type: ignore[arg-type]
    rows = []
    for t in range(6):
        if hurt is not None and t == 2:
            hurt()
        rows.append(loop.iterate())
    rewards = loop.evaluate()
    tensors, _ = loop.state()
    state = {name: np.asarray(value).tobytes() for name, value in (tensors | rewards).items()}
    return state, rows


def test_any_number_of_actors_gives_the_bits_of_this_process_even_when_one_is_killed(ray_cluster: Any) -> None:
    expected = trained(p.in_process(SETTING))
    one = spawn(1)
    assert trained(one) == expected
    one.stop()
    three = spawn(3)
    before = [int(told["pid"]) for told in three.telemetry()]
    assert trained(three, hurt=lambda: os.kill(before[1], signal.SIGKILL)) == expected
    told = three.telemetry()
    assert [int(t["pid"]) == pid for t, pid in zip(told, before, strict=True)] == [True, False, True]
    assert all(t["calls"] > 0 for t in told)
    three.stop()


def test_more_actors_than_the_machine_holds_are_refused(ray_cluster: Any) -> None:
    session = Session(ClusterConfig())
    session.embedded = True
    with pytest.raises(UserError, match="rollout_actors: got 100000 of 1 CPUs"):
        Rollers.spawn(session, made, (), count=100_000, cpus=1.0)
