"""The command line of the Byzantine job: what it refuses, and what it writes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import byzantine
from jobs.cli import main as raysys
from raysys.systems.byzantine.presets import PRESETS

ROOT = Path(__file__).resolve().parents[2]


def call(words, monkeypatch, capsys, entry=byzantine.main):
    monkeypatch.setattr(sys, "argv", ["jobs.byzantine", *words])
    code = 0
    try:
        entry()
    except SystemExit as stop:
        code = stop.code
    return code, capsys.readouterr()


REFUSED = {
    "too many byzantine": ["--byzantine", "10"],
    "negative byzantine": ["--byzantine", "-1"],
    "unknown rule": ["--rule", "medain"],
    "rule option": ["--rule", "krum(neighbours=3)"],
    "krum of a rule that does not fit": ["--rule", "bulyan", "--workers", "10", "--byzantine", "3"],
    "no such module": ["--rule", "no_such_module:rule"],
    "no such function": ["--rule", "math:no_such_function"],
    "peers' attack on a server": ["--attack", "dissensus"],
    "rule option type": ["--rule", "krum(neighbors=2.5)"],
    "empty sample": ["--sample", "5"],
    "server momentum of peers": ["--topology", "ring", "--momentum-at", "server"],
    "redrawn server": ["--redraw"],
    "sweep metric": ["sweep", "--metric", "acuracy"],
    "unknown preset": ["--preset", "near-iid"],
    "preset of a matrix": ["matrix", "--preset", "near_iid"],
    "unknown attack": ["--attack", "allie"],
    "attack option": ["--attack", "ipm(eps=2)"],
    "unknown partition": ["--partition", "sorted"],
    "partition parameter": ["--partition", "dirichlet(-1)"],
    "no groups": ["--partition", "natural"],
    "too few examples": ["--workers", "1000"],
    "unknown data": ["--data", "mnits"],
    "unknown problem": ["--problem", "transformer"],
    "cnn of a table": ["--data", "breast_cancer", "--problem", "cnn"],
    "momentum of one": ["--momentum", "1"],
    "zero step": ["--lr", "0"],
    "not a number": ["--lr", "fast"],
    "nan": ["--lr", "nan"],
    "unknown flag": ["--learning-rate", "1"],
    "flag twice": ["--lr", "1", "--lr", "2"],
    "no value": ["--rounds"],
    "half a round": ["--rounds", "1.5"],
    "sample of more": ["--sample", "21"],
    "shards in process": ["--shards", "2", "--execution", "inprocess"],
    "normalised shards": ["--shards", "2", "--normalised"],
    "peers with sampling": ["--topology", "ring", "--sample", "5"],
    "unknown graph": ["--topology", "cube"],
    "pulls on a ring": ["--topology", "ring", "--peer-rule", "rpel(pulls=3)"],
    "too few pulls": ["--topology", "complete", "--peer-rule", "rpel(pulls=5)"],
    "unknown peer rule": ["--topology", "ring", "--peer-rule", "clip"],
    "no such run": ["--resume", "no/such/run"],
    "no such config": ["--config", "no_such.yaml"],
    "unknown command": ["tarin"],
    "matrix of nothing": ["matrix", "--rules"],
    "matrix rule": ["matrix", "--rules", "mean", "krumm"],
    "matrix twice": ["matrix", "--rules", "mean", "mean"],
    "theory without its rule": ["theory", "--rules", "median"],
    "audit of half": ["audit", "--byzantine", "5", "--workers", "10"],
    "sweep of no field": ["sweep", "--space", "speed=1,2"],
    "sweep range on a grid": ["sweep", "--space", "lr=0.1..1"],
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_mistake_is_one_sentence_exit_two_and_nothing_left(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, said = call(REFUSED[case], monkeypatch, capsys)
    assert code == 2, said
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert "Traceback" not in said.err
    assert said.out == ""
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize("damage", ["not an idx", "truncated", "pickle", "bad csv"])
def test_a_damaged_data_file_is_refused_before_anything_is_written(damage, tmp_path, monkeypatch, capsys):
    data = tmp_path / "data"
    data.mkdir()
    if damage == "pickle":
        (data / "data_batch_1").write_bytes(b"\x80\x04.")
    elif damage == "bad csv":
        (data / "t.csv").write_text("x,label\n" + "1,a\n" * 20 + "?,b\n")
    else:
        head = b"\x00\x00\x08\x03" if damage == "truncated" else b"PK\x03\x04"
        (data / "train-images-idx3-ubyte").write_bytes(head + b"\x00" * 9)
        for name in ("train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
            (data / name).write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    source = str(data / "t.csv") if damage == "bad csv" else str(data)
    code, said = call(["--data", source], monkeypatch, capsys)
    assert code == 2
    assert said.err.startswith("error: data: ")
    assert said.err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_mistake_in_a_real_process_shows_no_traceback(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "jobs.byzantine", "--byzantine", "12"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_raysys_lists_its_systems_and_refuses_others(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["raysys", "--help"])
    raysys()
    assert "byzantine" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["raysys", "bizantine"])
    with pytest.raises(SystemExit) as stop:
        raysys()
    assert stop.value.code == 2


def summary(out):
    (run,) = out.glob("byzantine-*")
    return run, json.loads((run / "summary.json").read_text())


def test_training_writes_what_machines_and_people_read(tmp_path, monkeypatch, capsys):
    words = ["--execution", "inprocess", "--rounds", "40", "--seeds", "2", "--out", str(tmp_path)]
    code, said = call(words, monkeypatch, capsys)
    assert code == 0
    run, found = summary(tmp_path)
    assert said.out.splitlines()[-1] == f"run: {run}"
    assert {"system", "command", "config", "seeds", "wall_s", "peak_rss_mb", "table", "claims"} <= found.keys()
    assert found["seeds"] == [0, 1]
    arms = {row["arm"]: row["mean"] for row in found["table"] if row["metric"] == "accuracy"}
    assert arms["mean"] < 0.4 < 0.7 < arms["nnm+trimmed_mean"]
    assert {row["n"] for row in found["table"]} == {2}
    assert len(found["claims"]) == 3
    assert (run / "figures" / "curves.png").stat().st_size > 10_000
    page = (run / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert "http" not in page.split("<body")[0]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_trains(name, tmp_path, monkeypatch, capsys):
    more = ["--execution", "inprocess", "--rounds", "4", "--seeds", "1", "--no-baselines", "--out", str(tmp_path)]
    code, said = call(["--preset", name, *more], monkeypatch, capsys)
    assert code == 0, said.err
    _, found = summary(tmp_path)
    assert (PRESETS[name]() | {"rounds": 4}).items() <= found["config"].items()


def test_peers_train_with_their_baselines(tmp_path, monkeypatch, capsys):
    words = ["--topology", "erdos_renyi(p=0.7)", "--redraw", "--byzantine", "2", "--attack", "dissensus", "--lr", "0.2"]
    more = ["--execution", "inprocess", "--rounds", "20", "--seeds", "2", "--out", str(tmp_path)]
    code, _ = call([*words, *more], monkeypatch, capsys)
    assert code == 0
    _, found = summary(tmp_path)
    assert {row["arm"] for row in found["table"]} >= {"clip_2b", "gossip", "gossip, no attack"}
    assert found["claims"]


def test_a_users_own_rule_meets_every_attack_that_tries_it(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text("def rule(rows, f):\n    return rows.sort(0).values[f : len(rows) - f].mean(0)\n")
    monkeypatch.chdir(tmp_path)
    for spec in ("mine.py:rule", "nnm+mine.py:rule"):
        for attack in ("best_response", "opt_alie"):
            words = ["--rule", spec, "--attack", attack, "--rounds", "15", "--seeds", "1", "--no-baselines"]
            code, said = call(
                [*words, "--execution", "inprocess", "--workers", "8", "--byzantine", "2"], monkeypatch, capsys
            )
            assert code == 0, said.err


def test_matrix_audit_and_sweep_run_over_ray(ray_cluster, tmp_path, monkeypatch, capsys):
    small = ["--out", str(tmp_path / "m"), "--rounds", "20", "--seeds", "2", "--partitions", "iid"]
    code, _ = call(["matrix", *small, "--rules", "mean", "median", "--attacks", "none", "foe"], monkeypatch, capsys)
    assert code == 0
    _, found = summary(tmp_path / "m")
    worst = {r["rule"]: r["mean"] for r in found["table"] if r["attack"] == "worst"}
    assert worst["mean"] < worst["median"]

    code, _ = call(["audit", "--rules", "trimmed_mean", "--out", str(tmp_path / "a")], monkeypatch, capsys)
    assert code == 0
    _, found = summary(tmp_path / "a")
    for row in found["table"]:  # trimmed mean is optimal: the search finds exactly f / (n - 2f)
        assert row["mean"] == pytest.approx(row["f"] / (10 - 2 * row["f"]), rel=1e-6)

    words = [
        "--space",
        "lr=0.001,0.5",
        "--rounds",
        "20",
        "--seeds",
        "1",
        "--attack",
        "none",
        "--out",
        str(tmp_path / "s"),
    ]
    code, _ = call(["sweep", *words], monkeypatch, capsys)
    assert code == 0
    _, found = summary(tmp_path / "s")
    by_step = {row["lr"]: row["mean"] for row in found["table"]}
    assert by_step[0.5] > by_step[0.001]
