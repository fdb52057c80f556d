"""Training: the same bits for any workers and after any failure; what DeepSpeed makes equals that up to rounding."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import learners_for_tests
import pytest
import torch
from jobs_for_tests import Walk
from learners_for_tests import Regression, regression
from torch import Tensor

from raysys.runtime.exact import Peers
from raysys.runtime.progress import Progress
from raysys.runtime.run import Run
from raysys.runtime.sentences import UserError
from raysys.runtime.steps import Task, train_here
from raysys.runtime.train import LearnerError, TrainConfig, fit, fit_here

HERE = Path(__file__).parent
EVERY_5 = TrainConfig(checkpoint_every=5)


@pytest.fixture
def workers(ray_cluster: Any) -> Iterator[None]:
    """Ray, whose workers get the test learners by value: they cannot import them by name."""
    import ray

    ray.cloudpickle.register_pickle_by_value(learners_for_tests)
    yield
    ray.cloudpickle.unregister_pickle_by_value(learners_for_tests)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[key] - b[key]).abs().max()) for key in a)


def rows(run: Run, stage: str) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in ("t", "stage")} for row in run.metrics.rows(stage)]


def test_sgd_is_its_closed_form_on_a_linear_model() -> None:
    learner = Regression("cpu", steps=3, linear=True)
    weights = torch.cat([learner.module.weight.detach()[0], learner.module.bias.detach()]).double()
    for step in range(3):
        batches = [learner.batch(step, block) for block in range(4)]
        x = torch.cat([torch.nn.functional.pad(x, (0, 1), value=1.0) for x, _ in batches]).double()
        y = torch.cat([y for _, y in batches]).double()[:, 0]
        weights -= learner.learning_rate(step) * 2 * x.T @ (x @ weights - y) / len(y)
    found = fit_here(None, regression(steps=3, linear=True), TrainConfig())
    assert torch.allclose(torch.cat([found["weight"][0], found["bias"]]).double(), weights, atol=1e-6)


@pytest.mark.usefixtures("workers")
def test_two_workers_end_with_the_bits_and_rows_of_this_process(run: Run) -> None:
    here = fit_here(run.stage("here"), regression(kind="adam"), EVERY_5, log_every=5)
    config = TrainConfig(workers=2, checkpoint_every=5)
    bar = Progress(12, "train", unit="steps")
    assert same(fit(run.stage("two"), None, regression(kind="adam"), config, log_every=5, progress=bar), here)
    assert bar.done == 12
    assert rows(run, "two") == rows(run, "here")
    assert [row["round"] for row in rows(run, "two")] == [4, 9, 11]
    assert {"loss", "learning_rate", "rmse"} < rows(run, "two")[0].keys()
    assert not run.storage.files(f"{run.stage('two').folder}/ray", recursive=True)
    assert same(fit(run.stage("two"), None, regression(raises_at=0), config), here)  # finished: nothing is started


@pytest.mark.slow
@pytest.mark.usefixtures("workers")
def test_a_killed_worker_of_four_costs_no_bit_and_doubles_no_row(run: Run, tmp_path: Path) -> None:
    here = fit_here(run.stage("here"), regression(kind="momentum"), EVERY_5, log_every=1)
    deadly = regression(kind="momentum", deadly=str(tmp_path / "died"), deadly_block=2)
    config = TrainConfig(workers=4, checkpoint_every=5)
    assert same(fit(run.stage("four"), None, deadly, config, log_every=1), here)
    assert (tmp_path / "died").exists()
    assert rows(run, "four") == rows(run, "here")
    (lost,) = run.events("workers lost")
    assert "worker 2" in lost["reason"]


@pytest.mark.usefixtures("workers")
def test_one_worker_goes_on_where_this_process_failed_with_the_same_bits(run: Run) -> None:
    here = fit_here(run.stage("here"), regression(kind="adam"), EVERY_5, log_every=2)
    with pytest.raises(KeyError, match="a bug"):
        fit_here(run.stage("one"), regression(kind="adam", raises_at=8), EVERY_5, log_every=2)
    assert [row["round"] for row in rows(run, "one")] == [1, 3, 5, 7]
    assert same(fit(run.stage("one"), None, regression(kind="adam"), EVERY_5, log_every=2), here)
    assert rows(run, "one") == rows(run, "here")


@pytest.mark.usefixtures("workers")
def test_what_the_learner_raises_is_not_tried_again(run: Run) -> None:
    with pytest.raises(LearnerError, match=r"KeyError: 'a bug in the learner'\n(?s:.*)learners_for_tests"):
        fit(run.stage("bug"), None, regression(raises_at=2), TrainConfig(workers=2))
    assert run.events("workers lost") == []


@pytest.mark.slow
@pytest.mark.usefixtures("workers")
def test_zero2_survives_a_kill_and_its_checkpoint_goes_on_without_deepspeed(run: Run, tmp_path: Path) -> None:
    here = fit_here(run.stage("here"), regression(kind="adam"), EVERY_5, log_every=1)
    config = TrainConfig(workers=2, checkpoint_every=5, deepspeed="zero2")
    deadly = regression(kind="adam", deadly=str(tmp_path / "died"))
    stage = run.stage("zero2")
    assert apart(fit(stage, None, deadly, config, log_every=1), here) < 1e-5
    assert len(run.events("workers lost")) == 1
    losses, expected = ([row["loss"] for row in rows(run, name)] for name in ("zero2", "here"))
    assert losses == pytest.approx(expected, abs=1e-5)
    run.storage.delete(f"{stage.checkpoints.folder(12)}/manifest.json")
    assert apart(fit_here(stage, regression(kind="adam"), EVERY_5, log_every=1), here) < 1e-5
    assert [row["round"] for row in rows(run, "zero2")] == list(range(12))


@pytest.mark.slow
def test_every_zero_stage_equals_the_plain_steps_and_resumes_them() -> None:
    """In two processes without Ray; see engines_for_tests.py."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1])}
    command = [sys.executable, str(HERE / "engines_for_tests.py")]
    other = subprocess.Popen(
        [*command, "1", port], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        first = subprocess.run([*command, "0", port], env=environment, capture_output=True, text=True, timeout=300)
    finally:
        other.kill()
        other.wait()
    assert first.returncode == 0, first.stderr[-2000:]
    found = [json.loads(line) for line in first.stdout.splitlines() if line.startswith("{")]
    assert len(found) == 12
    for row in found:
        for key in ("apart", "resumed", "into off", "losses"):
            assert row[key] < 1e-5, row
        assert row["moved"] > 0.01, row


def test_a_killed_job_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    program = str(HERE / "learners_for_tests.py")
    environment = {**os.environ, "PYTHONPATH": f"{HERE.parents[1]}:{HERE}"}
    first = subprocess.run([sys.executable, program, "--out", str(tmp_path)], env=environment, capture_output=True)
    assert first.returncode == -9
    (folder,) = tmp_path.glob("walk-*")
    with Run.open(Walk(resume=str(folder), wandb=False), system="walk", command="walk") as run:
        assert run.stage("train").checkpoints.latest().round == 5  # type: ignore[union-attr]
        assert run.metrics.rows("train")[-1]["round"] == 6
        here = fit_here(None, regression(), TrainConfig())
        assert same(fit_here(run.stage("train"), regression(), EVERY_5, log_every=1), here)
        assert [row["round"] for row in rows(run, "train")] == list(range(12))


def test_a_damaged_checkpoint_is_refused_and_the_one_before_is_used(run: Run) -> None:
    whole = fit_here(None, regression(kind="adam"), TrainConfig())
    stage = run.stage("train")
    with pytest.raises(KeyError):
        fit_here(stage, regression(kind="adam", raises_at=11), EVERY_5)
    file = f"{stage.checkpoints.folder(10)}/state.safetensors"
    data = run.storage.read_bytes(file)
    run.storage.write_bytes(file, data[:-1] + bytes([data[-1] ^ 1]))
    assert same(fit_here(stage, regression(kind="adam"), EVERY_5, log_every=1), whole)
    (refused,) = {event["checkpoint"] for event in run.events("checkpoint refused")}
    assert refused == stage.checkpoints.folder(10)
    assert rows(run, "train")[0]["round"] == 5  # went on from step 5, not from the start


def test_clipping_bounds_the_step() -> None:
    start = {name: p.detach().clone() for name, p in Regression("cpu", linear=True).module.named_parameters()}
    end = fit_here(None, regression(linear=True, steps=1), TrainConfig(clip=0.1))
    moved = sum(float((end[name] - p).square().sum()) for name, p in start.items()) ** 0.5
    assert moved == pytest.approx(0.05 * 0.1, rel=1e-4)


def test_a_loss_that_is_not_finite_ends_training_with_its_step(run: Run) -> None:
    with pytest.raises(FloatingPointError, match=r"the loss of step 3 is nan; expected a finite number"):
        fit_here(run.stage("train"), regression(bad_step=3), TrainConfig())


def test_workers_that_do_not_divide_the_blocks_are_refused() -> None:
    with pytest.raises(UserError, match=r"train.workers: got 3; a step has 4 blocks"):
        train_here(Task(regression(), TrainConfig(workers=3), 1), "cpu", Peers(0, 3), lambda *told: None)


@pytest.mark.usefixtures("ray_cluster")
def test_more_workers_than_the_cluster_holds_are_refused(run: Run) -> None:
    with pytest.raises(UserError, match=r"train.workers: got 999 workers of 1 CPUs and 0 GPUs; there are \d+ CPUs"):
        fit(run.stage("train"), None, regression(), TrainConfig(workers=999))


class TwoMinds(Peers):
    """Two workers of which the other always answers with something else."""

    def __init__(self) -> None:
        super().__init__(0, 2)

    def gather(self, mine: Tensor) -> list[Tensor]:
        return [mine, mine + 1]


def test_workers_that_built_different_modules_are_told_so() -> None:
    with pytest.raises(RuntimeError, match="do not hold the same parameters and buffers before the first step"):
        train_here(Task(regression(), TrainConfig()), "cpu", TwoMinds(), lambda *told: None)


def test_deepspeed_in_the_job_s_own_process_is_refused() -> None:
    with pytest.raises(UserError, match=r"train.deepspeed: got zero1"):
        fit_here(None, regression(), TrainConfig(deepspeed="zero1"))


def test_a_share_of_a_gpu_cannot_be_one_of_several_workers() -> None:
    with pytest.raises(UserError, match=r"gpus_per_worker: got 0.5 for 2 workers; NCCL needs whole GPUs"):
        TrainConfig.of({"workers": 2, "gpus_per_worker": 0.5})
