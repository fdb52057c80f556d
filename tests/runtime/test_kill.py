"""SIGKILL at random moments: no run is lost or corrupted, and the resumed one ends with the same bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jobs_for_tests
from jobs_for_tests import Walk, walk

from raysys.runtime.run import Run

KILLS = 20


def _rows(run: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    return sorted(({k: v for k, v in row.items() if k != "t"} for row in rows), key=lambda r: (r["stage"], r["round"]))


def test_twenty_random_sigkills_lose_nothing_and_the_resumed_run_has_the_same_bits(tmp_path: Path) -> None:
    out = tmp_path / "runs"
    out.mkdir()
    program = [sys.executable, jobs_for_tests.__file__, "torture", str(out), str(KILLS), "7"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    said = subprocess.run(program, capture_output=True, text=True, env=environment, check=True, timeout=120).stdout
    lines = said.splitlines()
    assert [line.split()[0] for line in lines] == ["killed"] * KILLS, said
    run = lines[-1].split()[1]
    assert "refused" not in (tmp_path / "stderr").read_text()

    before = [json.loads(line)["stage"] for line in Path(run, "results.jsonl").read_text().splitlines()[:-1]]
    assert before, "the kills must have hit a run in progress"
    config = Walk(cells=40, rounds=24, wandb=False, out=str(tmp_path / "calm"))
    with Run.open(Walk(resume=run, pause=0.0), system="walk", command="walk") as resumed:
        walk(resumed)
    with Run.open(config, system="walk", command="walk") as calm:
        walk(calm)
    assert Path(run, "results.jsonl").read_bytes() == Path(calm.path, "results.jsonl").read_bytes()
    assert _rows(run) == _rows(calm.path)
    summaries = [json.loads(Path(path, "summary.json").read_text()) for path in (run, calm.path)]
    assert summaries[0]["table"] == summaries[1]["table"]
    assert summaries[0]["messages"] == summaries[1]["messages"] == 40 * 24
    assert not [name for name in resumed.storage.files(recursive=True) if name.endswith(".tmp")]
