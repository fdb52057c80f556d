"""SIGKILL of the controller at random moments: the run that is resumed ends with the bits of one that was left in peace."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raysys.runtime.checkpoint import read_state
from raysys.runtime.storage import Storage

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["--seeds", "1", "--no-baselines", "--no-wandb", "--attack", "mimic", "--dropout", "0.1", "--log-every", "50"]


def start(*words, out):
    command = [sys.executable, "-m", "jobs.byzantine", "train", *words]
    log = (out / "log.txt").open("a")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True, env=env)


def finish(*words, out):
    process = start(*words, out=out)
    assert process.wait(timeout=400) == 0, (out / "log.txt").read_text()[-3000:]


def folder(out):
    runs = [p for p in out.glob("byzantine-train-*") if (p / "config.yaml").exists()]
    assert len(runs) <= 1
    return runs[0] if runs else None


def outcome(out):
    run = folder(out)
    (stage,) = (run / "stages").iterdir()
    state, _ = read_state(Storage(str(run)), f"stages/{stage.name}/model.safetensors")
    rows = [line.split('"t"')[0] for line in (run / "metrics.jsonl").read_text().splitlines()]
    return state["model"].tobytes(), rows


@pytest.mark.slow
@pytest.mark.parametrize(("execution", "kills", "rounds"), [("inprocess", 20, 6000), ("actors", 5, 400)])
def test_a_run_killed_again_and_again_ends_with_the_bits_of_an_undisturbed_one(execution, kills, rounds, tmp_path):
    words = [*FLAGS, "--execution", execution, "--rounds", str(rounds), "--cluster.snapshot-every", "40"]
    calm, hurt = tmp_path / "calm", tmp_path / "hurt"
    calm.mkdir()
    hurt.mkdir()
    finish(*words, "--out", str(calm), out=calm)
    moments = random.Random(execution)
    for _ in range(kills):
        run = folder(hurt)
        process = start(*(["--resume", str(run)] if run else [*words, "--out", str(hurt)]), out=hurt)
        # Half the kills fall anywhere from start-up on, half soon after the first new sign of progress.
        if moments.random() < 0.5:
            time.sleep(moments.uniform(0.2, 6.0))
        else:
            before = sizes(hurt)
            deadline = time.monotonic() + 60
            while sizes(hurt) == before and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(moments.uniform(0.0, 0.4))
        assert process.poll() is None, "the run came to its end before the last kill: give it more rounds"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    run = folder(hurt)
    finish(*(["--resume", str(run)] if run else [*words, "--out", str(hurt)]), out=hurt)
    assert outcome(hurt) == outcome(calm)


def sizes(out):
    """What changes when a run makes progress; a folder that vanishes while we look (an old barrier deleted) is progress too."""
    try:
        return sorted(str(p) for p in out.rglob("manifest.json"))
    except FileNotFoundError:
        return ["a barrier was just deleted"]
