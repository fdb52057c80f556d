"""Run folders: what they hold, who may open them, and what a resume keeps."""

from __future__ import annotations

import json
import math
import os
import secrets
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jobs_for_tests import Site, Walk, walk
from matplotlib.figure import Figure

from raysys.runtime import lock
from raysys.runtime.config import exits
from raysys.runtime.run import Run
from raysys.runtime.sentences import UserError
from raysys.runtime.statistics import mean_ci


@pytest.fixture(params=["local", "mock"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A local folder, and pyarrow's in-memory store: the code path of s3 and gs."""
    return str(tmp_path / "runs") if request.param == "local" else f"mock://{secrets.token_hex(4)}/runs"


def start(out: str, **values: Any) -> Run:
    return Run.open(Walk(out=out, wandb=False, **values), system="walk", command="walk")


def resume(run: Run, **values: Any) -> Run:
    return Run.open(Walk(resume=run.path, wandb=False, **values), system="walk", command="walk")


def summary(run: Run) -> dict[str, Any]:
    return dict(json.loads(run.storage.read_bytes("summary.json")))


def test_a_finished_run_holds_what_machines_read(out: str, capsys: pytest.CaptureFixture[str]) -> None:
    with start(out, seed=5, seeds=2) as run:
        walk(run)
        run.claim("norms grow", "Theorem 1", True, mean_ci([1.0, 2.0]), "figures/a.png")
    said = summary(run)
    assert (said["system"], said["command"], said["status"]) == ("walk", "walk", "finished")
    assert said["seeds"] == [5, 6]
    assert said["config"]["cells"] == 3
    assert said["wall_s"] >= 0
    assert said["peak_rss_mb"] > 10
    (row,) = said["table"]
    assert set(row) == {"rule", "attack", "metric", "mean", "ci_low", "ci_high", "n"}
    (claim,) = said["claims"]
    assert set(claim) == {"claim", "source", "holds", "figure", "interval"}
    assert {"config.yaml", "events.jsonl", "metrics.jsonl", "report.html", "results.jsonl", "run.json"} <= set(
        run.storage.files()
    )
    assert capsys.readouterr().out.splitlines()[-1] == f"run: {run.path}"


def test_the_name_of_the_folder_tells_system_command_and_time(out: str) -> None:
    with start(out) as run:
        assert run.path.rpartition("/")[2].startswith("walk-walk-2")
        assert run.path.startswith(out)


def test_a_resumed_run_skips_finished_stages_and_keeps_totals(out: str) -> None:
    with start(out) as run:
        walk(run)
    with resume(run) as again:
        assert again.resumed
        assert again.config == run.config.with_values({"resume": run.path})
        assert again.stage("nnm+mean/alie/seed0").result == run.stage("nnm+mean/alie/seed0").result
        walk(again)
    assert summary(again)["table"] == summary(run)["table"]
    assert summary(again)["messages"] == summary(run)["messages"] == 36
    assert summary(again)["resumed"] == 1
    assert summary(again)["wall_s"] >= summary(run)["wall_s"]
    assert len(again.metrics.rows()) == 36


def test_an_interrupted_stage_continues_from_its_barrier_to_the_same_bits(out: str) -> None:
    class Stop(Exception):
        pass

    def broken(run: Run) -> None:
        with run:
            original, logged = run.metrics.log, 0

            def log(*args: Any) -> None:
                nonlocal logged
                logged += 1
                if logged == 20:
                    raise Stop
                original(*args)

            run.metrics.log = log  # type: ignore[method-assign]
            walk(run)

    run = start(out)
    with pytest.raises(Stop):
        broken(run)
    assert summary(run)["status"] == "failed"
    assert run.events("failed")[0]["error"].startswith("Stop")
    with resume(run) as again:
        walk(again)
    with start(out) as calm:
        walk(calm)
    assert again.storage.read_bytes("results.jsonl") == calm.storage.read_bytes("results.jsonl")
    rows = [[{k: v for k, v in row.items() if k != "t"} for row in each.metrics.rows()] for each in (again, calm)]
    assert rows[0] == rows[1]


def test_a_result_reads_the_same_fresh_and_resumed(out: str) -> None:
    given = {"pair": (1, 2), "array": np.eye(2), "number": np.float32(0.1), "nan": math.nan, "flag": np.bool_(True)}
    with start(out) as run:
        fresh = run.stage("odd").finish(given)
        assert fresh["pair"] == [1, 2]
        assert fresh["number"] == float(np.float32(0.1))
    with resume(run) as again:
        assert repr(again.stage("odd").result) == repr(fresh)


def test_a_result_that_is_no_data_is_refused(out: str) -> None:
    with start(out) as run, pytest.raises(TypeError, match="numbers, texts, lists and dicts, got object"):
        run.stage("odd").finish({"x": object()})


def test_stages_of_any_name_have_folders_of_their_own(tmp_path: Path) -> None:
    with start(str(tmp_path)) as run:
        names = ["a/b", "a.b", "../../x", "", ".", "é/💥", "x" * 500, "A/B", "nnm+krum(q=2)/alie(z=1.5)/seed0"]
        folders = [run.stage(name).folder for name in names]
        for stage in map(run.stage, names):
            run.storage.write_bytes(f"{stage.folder}/x", b"")
            stage.finish({"name": stage.name})
    assert len(set(folders)) == len(names)
    with resume(run) as again:
        assert [again.stage(name).result for name in names] == [{"name": name} for name in names]


def test_rows_logged_again_after_a_resume_replace_the_first(out: str) -> None:
    with start(out) as run:
        for t in range(6):
            run.stage("a").log(t, x=t)
            run.stage("b").log(t, x=t)
    with resume(run) as again:
        again.stage("a").log(4, x=40)
        again.stage("a").log(4, y=41)
        again.stage("b").rewind(2)
    assert [row["x"] for row in again.metrics.rows("a") if "x" in row] == [0, 1, 2, 3, 40]
    assert len(again.metrics.rows("a")) == 6
    assert [row["round"] for row in again.metrics.rows("b")] == [0, 1]


def test_numbers_that_json_lacks_are_null_in_metrics(out: str) -> None:
    with start(out) as run:
        run.stage("a").log(0, loss=math.nan, worst=np.float32("inf"), many=np.array([1.0, math.nan]))
        with pytest.raises(ValueError, match="'round'"):
            run.metrics.log("a", 1, {"round": 3})
    (row,) = [json.loads(line) for line in run.storage.read_bytes("metrics.jsonl").splitlines()]
    assert (row["loss"], row["worst"], row["many"]) == (None, None, [1.0, None])


def test_a_run_in_use_is_refused_to_another(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with start(out) as run:
        with pytest.raises(UserError, match=f"process {os.getpid()} on .*expected a run in use by none"):
            resume(run)
        run.stage("a").finish({})
    with resume(run) as again:
        assert again.stage("a").result == {}


def test_a_lease_without_heartbeat_is_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with start(f"mock://{secrets.token_hex(4)}/runs") as run:
        pass
    run.storage.write_bytes("lock", json.dumps({"token": "x", "owner": "process 1 on dead", "time": 0.0}).encode())
    with resume(run) as again:
        held = json.loads(again.storage.read_bytes("lock"))
        assert held["owner"] == again._lock.owner
    assert not again.storage.exists("lock")


def test_a_lease_is_renewed_while_the_run_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT", 0.01)
    with start(f"mock://{secrets.token_hex(4)}/runs") as run:
        first = json.loads(run.storage.read_bytes("lock"))["time"]
        for _ in range(1000):
            if json.loads(run.storage.read_bytes("lock"))["time"] > first:
                break
            run._lock._stop.wait(0.01)
        assert json.loads(run.storage.read_bytes("lock"))["time"] > first


def test_a_resumed_run_may_move_but_not_change(out: str) -> None:
    with start(out) as run:
        pass
    with resume(run, site=Site(hosts=7)) as again:
        assert again.config.site.hosts == 7  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"rate: got 0\.5; this run was started with 0\.1"):
        resume(run, rate=0.5)
    with pytest.raises(UserError, match="a run of walk walk; expected one of walk table"):
        Run.open(Walk(resume=run.path), system="walk", command="table")


def test_a_refused_checkpoint_is_said_and_recorded(out: str, capsys: pytest.CaptureFixture[str]) -> None:
    with start(out) as run:
        walk(run)
        checkpoints = run.stage("nnm+mean/alie/seed0").checkpoints
        run.storage.write_bytes(f"{checkpoints.folder(12)}/x.safetensors", b"bad")
        found = checkpoints.latest()
        assert found is not None
        assert found.round == 8
        assert "checkpoint refused" in capsys.readouterr().err
        assert run.events("checkpoint refused")[0]["checkpoint"] == checkpoints.folder(12)


def test_ctrl_c_records_the_interruption_and_exits_with_130(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = []

    @exits
    def main() -> None:
        with start(str(tmp_path)) as run:
            runs.append(run)
            raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 130
    said = capsys.readouterr()
    assert f"go on with: --resume {runs[0].path}" in said.err
    assert said.out.splitlines()[-1] == f"run: {runs[0].path}"
    assert summary(runs[0])["status"] == "interrupted"
    with resume(runs[0]):
        pass


def test_sigterm_ends_a_run_with_a_summary(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop, start(str(tmp_path)) as run:
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.value.code == 128 + signal.SIGTERM
    assert summary(run)["status"] == "interrupted"
    assert signal.getsignal(signal.SIGTERM) == before


def test_many_small_stages_are_cheap_in_files(tmp_path: Path) -> None:
    with start(str(tmp_path)) as run:
        for i in range(300):
            stage = run.stage(f"rule{i % 20}/attack{i // 20}/seed0")
            assert stage.result is None
            stage.log(0, accuracy=0.5)
            stage.finish({"accuracy": 0.5})
    assert len(run.storage.files(recursive=True)) < 12


def test_a_figure_is_a_file_and_in_the_report(out: str) -> None:
    with start(out) as run:
        figure = Figure()
        figure.subplots().plot([1, 2])
        assert run.figure("floor", figure) == "figures/floor.png"
    assert run.storage.read_bytes("figures/floor.png").startswith(b"\x89PNG")
    assert b"data:image/png;base64,iVBOR" in run.storage.read_bytes("report.html")


def test_importing_the_runtime_needs_no_ray() -> None:
    program = "import raysys.runtime.run, sys; sys.exit('ray' in sys.modules or 'wandb' in sys.modules)"
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", program], cwd=root, check=False).returncode == 0
