"""Training over Ray actors: the same numbers on any layout, and after any loss."""

import os
import random
import signal
import time

import numpy as np
import pytest
import ray

MLP = {"problem": "mlp", "hidden": 128}
PEERS = {"topology": "erdos_renyi(p=0.6)", "attack": "dissensus", "byzantine": 2, "lr": 0.2}


def pid_of(crew, host):
    return ray.get(crew.hosts[host].do.remote("where"))["pid"]


def kill(name, sig=signal.SIGKILL):
    """Signal the process of a random host of the group whose states begin with `name`."""

    def hurt(rounds):
        (crew,) = [p for p in rounds.participants if next(iter(p.arguments[0][1])).startswith(name)]
        os.kill(pid_of(crew, random.randrange(len(crew.hosts))), sig)

    return hurt


def test_any_number_of_hosts_gives_the_bits_of_one_process(train):
    alone = train(execution="inprocess")
    for hosts in (1, 2, 4):
        spread = train(cluster={"hosts": hosts})
        assert np.array_equal(spread.model, alone.model), hosts
        measured = {k: v for k, v in spread.result.items() if k in ("accuracy", "gradient_sq", "tail", "noise", "loss")}
        assert measured == {k: alone.result[k] for k in measured}


@pytest.mark.parametrize("rule", ["nnm+trimmed_mean", "median", "arc+geometric_median", "bulyan", "centered_clipping"])
def test_a_server_cut_into_shards_gives_the_bits_of_a_whole_one(train, rule):
    whole = train(rule=rule, rounds=10, execution="inprocess", byzantine=3, **MLP)
    cut = train(rule=rule, rounds=10, shards=3, byzantine=3, **MLP)
    assert np.array_equal(cut.model, whole.model)


def test_peers_on_hosts_give_the_bits_of_one_process(train):
    alone = train(execution="inprocess", **PEERS)
    spread = train(**PEERS)
    assert np.array_equal(spread.model, alone.model)
    assert spread.result["consensus"] == alone.result["consensus"]


@pytest.mark.parametrize("name", ["clients", "adversaries", "server"])
@pytest.mark.parametrize("at", [*random.Random(2).sample(range(23), 2), 23])
def test_a_killed_process_changes_no_bit(train, name, at):
    values = {"attack": "mimic", "dropout": 0.2, "remember": True}
    calm = train(execution="inprocess", **values)
    hurt = train(hurt=(at, kill(name)), **values)
    assert [e["kind"] for e in hurt.events].count("recovered") >= 1
    assert np.array_equal(hurt.model, calm.model)
    assert hurt.result["messages"] == train(**values).result["messages"]


def test_what_an_attack_learned_before_the_first_barrier_is_unlearned_by_a_replay(train):
    values = {"attack": "mimic(warmup=6)", "momentum_at": "none", "rule": "mean"}
    calm = train(execution="inprocess", **values)
    for at in (4, 7):
        assert np.array_equal(train(hurt=(at, kill("clients")), **values).model, calm.model)


def test_a_killed_shard_and_a_killed_peer_change_no_bit(train):
    assert np.array_equal(
        train(hurt=(5, kill("server")), shards=2, rounds=10, **MLP).model,
        train(rounds=10, execution="inprocess", **MLP).model,
    )
    assert np.array_equal(train(hurt=(11, kill("peers")), **PEERS).model, train(execution="inprocess", **PEERS).model)


@pytest.mark.parametrize("name", ["clients", "adversaries", "server"])
def test_a_host_that_hangs_is_treated_as_dead_and_no_other(train, name):
    hurt = train(hurt=(9, kill(name, signal.SIGSTOP)), cluster={"timeout_s": 6.0})
    assert "owed an answer" in next(e["reason"] for e in hurt.events if e["kind"] == "host lost")
    (recovered,) = [e for e in hurt.events if e["kind"] == "recovered"]
    assert len(recovered["replaced"]) == 1
    assert name in recovered["replaced"][0]
    assert np.array_equal(hurt.model, train(execution="inprocess").model)


def test_a_lost_ray_node_changes_no_bit(train, free_all, ray_cluster):
    free_all()
    node = ray_cluster.add_node(num_cpus=1, include_dashboard=False)

    def hurt(rounds):
        ray_cluster.remove_node(node, allow_graceful=False)

    # Five hosts of one CPU: the head has four, so at least one is on the node that is lost; there is room for four only
    # afterwards, so a second node joins before.
    other = ray_cluster.add_node(num_cpus=2, include_dashboard=False)
    try:
        spread = train(hurt=(12, hurt), block=3, cluster={"hosts": 5, "cpus_per_host": 1.0})
    finally:
        ray_cluster.remove_node(other, allow_graceful=False)
    assert np.array_equal(spread.model, train(execution="inprocess", block=3).model)


def test_a_round_with_too_few_workers_is_skipped_and_counted(train):
    out = train(dropout=0.6, byzantine=4, execution="inprocess", rounds=40, rule="trimmed_mean")
    assert 0 < out.result["skipped"] < 40  # 20 workers, 16 honest, 6.4 on average: often too few for f = 4


def test_traffic_is_the_closed_form(train):
    out = train(rounds=10)
    d, n, h = 650, 20, 16
    assert out.result["messages"] == 10 * (n + h)
    assert out.result["bytes"] == 10 * (n + h) * 4 * d
    assert out.result["refused"] == 0


def test_a_bug_in_a_users_rule_is_raised_and_not_retried(train, tmp_path, monkeypatch):
    (tmp_path / "buggy_rule.py").write_text("def rule(x):\n    return x.mean(0)[: len(x[0]) // int(x.mean() > 1e9)]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    started = time.monotonic()
    with pytest.raises(ZeroDivisionError):
        train(rule="buggy_rule:rule", attack="alie", execution="inprocess")
    assert time.monotonic() - started < 60
