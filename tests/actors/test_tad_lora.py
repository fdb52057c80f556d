"""Decentralised LoRA over Ray actors: the same numbers on any layout, after any loss, and nothing averaged that must not be."""

import os
import signal

import numpy as np
import pytest
import ray

from actors.message import Message
from actors.peer import Peer
from jobs.tad_lora import TrainConfig, train_once
from raysys.runtime.progress import Progress
from raysys.runtime.rounds import Rounds
from raysys.runtime.run import Run
from raysys.runtime.session import Session
from raysys.systems.tad_lora.evaluation import evaluate
from raysys.systems.tad_lora.task import Task
from tests.actors.conftest import IDLE

REGRESSION = {
    "problem": "regression", "optimizer": "sgd", "lr": 0.01, "steps": 5, "rounds": 20, "evaluate_every": 5, "block": 2,
    "topology": "erdos_renyi(p=0.2)", "beside": [], "seeds": 1, "wandb": False, "interval": 2,
}  # fmt: skip
TEXT = {"data": "grammar(train=120, test=40)", "test": 16, "steps": 2, "batch": 2, "rounds": 3, "layers": 1, "block": 5}


@pytest.fixture
def finish(ray_cluster, tmp_path, monkeypatch):
    """finish(hurt=(round, function of the Rounds), **config) -> the stage's result and the run's events."""
    original = Rounds.due

    def run(hurt=None, **values):
        problem = {**REGRESSION, "problem": "text", **TEXT} if values.get("problem") == "text" else REGRESSION
        cluster = {"hosts": 2, "cpus_per_host": 0.5, "snapshot_every": 6, "timeout_s": 60.0}
        config = TrainConfig.of({**problem, "out": str(tmp_path), "cluster": cluster, **values})
        done = []

        def due(self, t):
            if hurt is not None and t == hurt[0] and not done:
                done.append(t)
                hurt[1](self)
            return original(self, t)

        monkeypatch.setattr(Rounds, "due", due)
        with Session(config.cluster) as session, Run.open(config, system="tad_lora", command="train") as folder:
            session.idle = IDLE
            stage = folder.stage("only")
            with Progress(config.rounds, "test") as progress:
                train_once(config, config.arm(config.method), 3, stage, session, progress)
            return stage.result, folder.events()

    return run


def same(one, other):
    """Whether two results have the same numbers, however they were computed."""
    left_out = {"refused", "curve"}
    assert {k: v for k, v in one.items() if k not in left_out} == {k: v for k, v in other.items() if k not in left_out}
    strip = [[{k: v for k, v in row.items() if k != "t"} for row in result["curve"]] for result in (one, other)]
    assert strip[0] == strip[1]


@pytest.mark.parametrize("method", ["tad", "rolora", "decaf"])
def test_any_number_of_hosts_gives_the_bits_of_one_process(finish, method):
    alone, _ = finish(method=method, execution="inprocess")
    for hosts in (1, 2):
        spread, _ = finish(method=method, cluster={"hosts": hosts, "cpus_per_host": 0.5})
        same(spread, alone)
    assert alone["bytes"] > 0


def test_text_over_actors_is_text_in_one_process(finish):
    values = {"problem": "text", "optimizer": "adamw", "lr": 0.005}
    same(finish(**values)[0], finish(execution="inprocess", **values)[0])


def killed(rounds):
    (crew,) = rounds.participants
    os.kill(ray.get(crew.hosts[1].do.remote("where"))["pid"], signal.SIGKILL)


@pytest.mark.parametrize("at", [3, 19])
def test_a_killed_peer_changes_no_bit(finish, at):
    hurt, events = finish(hurt=(at, killed))
    assert [event["kind"] for event in events].count("recovered") == 1
    same(hurt, finish(execution="inprocess")[0])


def test_a_kill_while_the_peers_probe_changes_no_bit(finish):
    values = {"interval": 0, "interval_from": "probe", "probe_rounds": 30}
    hurt, _ = finish(hurt=(20, killed), **values)
    same(hurt, finish(execution="inprocess", **values)[0])
    assert hurt["interval"] >= 1


@pytest.mark.parametrize("topology", ["erdos_renyi(p=0.0)", "one_peer_exponential", "ring+dropout(p=0.5)"])
def test_a_partitioned_directed_or_lossy_graph_is_no_obstacle(finish, topology):
    result, _ = finish(topology=topology, absence=0.3)
    assert np.isfinite(result["error"])
    assert (result["bytes"] == 0) == (topology == "erdos_renyi(p=0.0)")


@pytest.fixture
def host():
    """A host of all ten peers of a run on the complete graph, without Ray; its second round is about to be exchanged."""
    task = Task(TrainConfig.of(REGRESSION | {"topology": "complete"}).arm("tad"), 3)
    made = Peer(task.peers, {"a": np.arange(5), "b": np.arange(5, 10)}, 10, lambda parts: evaluate(task, parts))
    made.exchange(0, (0, {}), made.train(0))
    return made


def factors(host):
    return np.concatenate([block.a for block in host.blocks.values()]), np.concatenate(
        [b.b for b in host.blocks.values()]
    )


@pytest.mark.parametrize(
    "damage",
    [
        lambda m: Message(m.round - 1, m.ids, m.rows),
        lambda m: Message(m.round, m.ids, m.rows[:, :-1]),
        lambda m: Message(m.round, m.ids, m.rows.astype(np.float64)),
        lambda m: Message(m.round, m.ids + 90, m.rows),
        lambda m: Message(m.round, np.zeros_like(m.ids), m.rows),
    ],
    ids=["stale", "another shape", "another type", "unknown senders", "one sender twice"],
)
def test_a_stale_or_malformed_message_is_refused_and_nobody_is_mixed_with_it(host, damage):
    message = host.train(1)
    before = factors(host)
    half = Message(message.round, message.ids[:5], message.rows[:5]), Message(1, message.ids[5:], message.rows[5:])
    host.exchange(1, (1, {}), half[0], damage(half[1]))
    after = factors(host)
    assert host.refused == 1
    for x, y in zip(before, after, strict=True):
        assert np.array_equal(x[5:], y[5:])  # those who were not heard are alone
        assert np.abs(y[:5] - x[:5].astype(np.float64).mean(0)).max() < 1e-6  # the others average among themselves


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_peer_that_sends_what_is_not_finite_is_alone_and_the_others_mean_is_kept(host, poison):
    message = host.train(1)
    rows = message.rows.copy()
    rows[7, 3] = poison
    before = factors(host)
    host.exchange(1, (1, {}), Message(1, message.ids, rows))
    others = [i for i in range(10) if i != 7]
    for x, y in zip(before, factors(host), strict=True):
        assert np.abs(y[others] - x[others].astype(np.float64).mean(0)).max() < 1e-6
        assert np.array_equal(x[7], y[7])
    assert sum(block.outcomes()["not_finite"] for block in host.blocks.values()) == 2  # each block saw it once
