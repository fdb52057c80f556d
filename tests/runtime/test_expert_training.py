"""Training with experts shared out over workers: the steps of one process, whatever shares them and whoever dies."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mixture_for_tests
import pytest
import torch
from mixture_for_tests import EXPERTS, mixture
from pydantic import ValidationError
from torch import Tensor

from raysys.runtime.exact import Peers
from raysys.runtime.run import Run
from raysys.runtime.sentences import UserError
from raysys.runtime.steps import Task, train_here
from raysys.runtime.train import TrainConfig, fit, fit_here

HERE = Path(__file__).parent


@pytest.fixture
def workers(ray_cluster: Any) -> Iterator[None]:
    """Ray, whose workers get the test learners by value: they cannot import them by name."""
    import ray

    ray.cloudpickle.register_pickle_by_value(mixture_for_tests)
    yield
    ray.cloudpickle.unregister_pickle_by_value(mixture_for_tests)


def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[key] - b[key]).abs().max()) for key in a)


@pytest.mark.slow
def test_shared_out_experts_make_the_steps_of_one_process_and_checkpoints_convert() -> None:
    """In two processes without Ray, see mixture_for_tests.py: SGD would show a wrong scale of gradients, Adam would not."""
    pytest.importorskip("deepspeed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1])}
    command = [sys.executable, str(HERE / "mixture_for_tests.py")]
    other = subprocess.Popen(
        [*command, "1", port], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        first = subprocess.run([*command, "0", port], env=environment, capture_output=True, text=True, timeout=300)
    finally:
        other.kill()
        other.wait()
    assert first.returncode == 0, first.stderr[-2000:]
    *found, refused = [json.loads(line) for line in first.stdout.splitlines() if line.startswith("{")]
    assert refused == {
        "none": "train.expert_parallel: got 2, but the system has no experts to share out; expected 1",
        "nine": "train.expert_parallel: got 2; 9 experts cannot be shared out evenly by 2 processes",
    }
    assert len(found) == 11
    for row in found:
        for key in ("apart", "losses", "resumed", "into off", "into other"):
            assert row[key] < 1e-5, row  # 3e-8 to 3e-6
        assert row["moved"] > 5e-4, row


@pytest.mark.slow
@pytest.mark.usefixtures("workers")
def test_a_killed_worker_with_half_the_experts_costs_nothing_and_one_process_goes_on(run: Run, tmp_path: Path) -> None:
    here = fit_here(run.stage("here"), mixture(kind="adam"), TrainConfig(checkpoint_every=5), log_every=1)
    config = TrainConfig(workers=2, checkpoint_every=5, deepspeed="zero1", expert_parallel=2)
    stage = run.stage("shared")
    deadly = mixture(kind="adam", deadly=str(tmp_path / "died"))
    found = fit(stage, None, deadly, config, log_every=1)
    assert (tmp_path / "died").exists()
    assert len(run.events("workers lost")) == 1
    assert found["layers.0.w_in"].shape[0] == EXPERTS  # whole
    assert apart(found, here) < 1e-5
    rows, expected = (run.metrics.rows(name) for name in ("shared", "here"))
    assert [row["round"] for row in rows] == list(range(12))
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in expected], abs=1e-5)
    run.storage.delete(f"{stage.checkpoints.folder(12)}/manifest.json")
    assert apart(fit_here(stage, mixture(kind="adam"), TrainConfig(checkpoint_every=5), log_every=1), here) < 1e-5


def test_a_group_s_lr_scale_is_a_factor_of_its_rate() -> None:
    start, whole = mixture()("cpu").module.state_dict(), fit_here(None, mixture(steps=1), TrainConfig())

    def equal(device: str) -> Any:
        learner = mixture(steps=1)(device)
        learner.optimizer = lambda: torch.optim.SGD([p for p in learner.module.parameters() if p.requires_grad])  # type: ignore[method-assign]
        return learner

    plain = fit_here(None, equal, TrainConfig())
    for name, before in start.items():
        factor = 0.3 if name.startswith("out") else 1.0
        assert torch.allclose(whole[name] - before, factor * (plain[name] - before), atol=1e-7), name


@pytest.mark.parametrize(
    ("told", "sentence"),
    [
        ({"workers": 2, "expert_parallel": 2}, "got 2 with deepspeed off; expected zero0, zero1 or zero2"),
        ({"workers": 2, "expert_parallel": 2, "deepspeed": "zero3"}, "got 2 with deepspeed zero3; expected"),
        ({"workers": 3, "expert_parallel": 2, "deepspeed": "zero1"}, "got 2 for 3 workers; expected a divisor of 3"),
        (
            {"workers": 2, "expert_parallel": 2, "deepspeed": "zero0", "clip": 1.0},
            "got 2 with clip and deepspeed zero0",
        ),
    ],
)
def test_settings_that_cannot_share_experts_are_refused(told: dict[str, Any], sentence: str) -> None:
    with pytest.raises((UserError, ValidationError), match=f"expert_parallel: {sentence}"):
        TrainConfig.of(told)


def test_one_worker_alone_needs_no_group() -> None:
    found = train_here(Task(mixture(steps=2), TrainConfig(), 1), "cpu", Peers(), lambda *told: None)
    assert found["module/layers.0.w_in"].shape[0] == EXPERTS
