"""Weights & Biases is a mirror: it writes offline, says nothing, and cannot stop a run. And progress on the console."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from jobs_for_tests import Walk, walk

from raysys.runtime import progress
from raysys.runtime.progress import Progress
from raysys.runtime.run import Run


@pytest.fixture
def online_unset(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))


def job(out: Path) -> Run:
    with Run.open(Walk(out=str(out)), system="walk", command="walk") as run:
        walk(run)
    return run


@pytest.mark.usefixtures("online_unset")
def test_without_a_login_an_offline_run_is_written_into_the_run_folder_in_silence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = job(tmp_path / "runs")
    (file,) = Path(run.path).glob("wandb/offline-run-*/run-*.wandb")
    content = file.read_bytes()
    for part in (b"nnm+mean/alie/seed0/norm", b"raysys"):
        assert part in content
    said = capfd.readouterr()
    assert said.err == ""
    assert "wandb" not in said.out


@pytest.mark.usefixtures("online_unset")
def test_a_failure_of_the_tracker_is_said_once_and_the_run_finishes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    def fail(**_: object) -> None:
        raise RuntimeError("no service\nat all")

    monkeypatch.setattr(wandb, "init", fail)
    run = job(tmp_path / "runs")
    assert run.status == "finished"
    assert len(run.metrics.rows()) == 36
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: Weights & Biases is off for this run (RuntimeError: no service at all)")


def test_no_wandb_never_imports_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with Run.open(Walk(out=str(tmp_path), wandb=False), system="walk", command="walk") as run:
        walk(run)
    assert run.status == "finished"


def test_progress_prints_plain_lines_when_not_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Progress(100, "train", done=20) as bar:
        for _ in range(30):
            now[0] += 0.5
            bar.advance()
            bar.note("loss 0.5")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "train: 20/100 rounds"
    assert lines[1].startswith("train: 30/100 rounds, 2 rounds/s, 35 s left")
    assert lines[-1] == "train: 50/100 rounds, 2 rounds/s, 25 s left (loss 0.5)"
    assert len(lines) == 4


def test_progress_shows_a_bar_with_rate_and_remaining_time_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "140")
    with Progress(10, "train") as bar:
        bar.advance(4)
        bar.note("loss 0.5")
    said = capsys.readouterr().err
    for part in ("4/10", "rounds/s", "left", "loss 0.5"):
        assert part in said
