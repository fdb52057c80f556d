"""The command line of the Rabtriever job: what it refuses, what it writes, and that a killed run ends with the same bits."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs import rabtriever
from jobs.rabtriever_index import read_corpus
from raysys.data.retrieval import load_retrieval
from raysys.runtime.sentences import UserError
from raysys.runtime.session import Session
from raysys.systems.rabtriever.artifact import FOLDER, Retriever
from raysys.systems.rabtriever.build import Builder
from raysys.systems.rabtriever.presets import PRESETS
from raysys.systems.rabtriever.versions import Root

ROOT = Path(__file__).resolve().parents[2]
DATA = "rationale(train=200,test=60)"
SMALL = [
    "--no-wandb", "--data", DATA, "--teacher.width", "32", "--teacher.layers", "1", "--teacher.steps", "8",
    "--teacher.batch", "16", "--student.steps", "12", "--student.batch", "16", "--student.hidden", "16",
]  # fmt: skip
REFUSED = {
    "no such data": ["train", "--data", "nowhere"],
    "generator option": ["train", "--data", "rationale(colour=3)"],
    "unknown combination": ["train", "--student.combine", "plus"],
    "four layers": ["train", "--student.layers", "4"],
    "a loss that is zero": ["train", "--student.mse-weight", "0", "--student.kl-weight", "0"],
    "samples of the forward KL": ["train", "--student.kl", "forward", "--student.kl-samples", "4"],
    "no such model": ["train", "--teacher.model", "/nowhere"],
    "workers that do not divide the blocks": ["train", "--train.workers", "3"],
    "preferences under ZeRO 3": ["train", "--teacher.objective", "sft+dpo", "--train.deepspeed", "zero3"],
    "unknown method": ["compare", "--methods", "student", "teacher", "oracle"],
    "nothing to compare": ["compare", "--methods", "bm25"],
    "evaluate without a run": ["evaluate"],
    "evaluate what is no run": ["evaluate", "--run", "/nowhere"],
    "index without a run": ["index"],
    "an index in a bucket": ["index", "--run", "/nowhere", "--index", "s3://b/x"],
    "robot without a run": ["robot"],
    "unknown metric": ["sweep", "--metric", "accuracy"],
    "unknown field of a sweep": ["sweep", "--space", "student.weight=1,2"],
}


def call(words: list[str], monkeypatch: Any, capsys: Any) -> tuple[int, Any]:
    monkeypatch.setattr(sys, "argv", ["jobs.rabtriever", *words])
    code = 0
    try:
        rabtriever.main()
    except SystemExit as stop:
        code = stop.code  # type: ignore[assignment]
    return code, capsys.readouterr()


@pytest.mark.parametrize("words", REFUSED.values(), ids=REFUSED.keys())
def test_bad_input_is_one_sentence_and_exit_code_2(
    words: list[str], tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    code, told = call([*words, "--out", str(tmp_path / "runs")], monkeypatch, capsys)
    assert code == 2
    assert told.err.startswith("error: ")
    assert told.err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_presets_are_valid() -> None:
    for values in PRESETS.values():
        rabtriever.TrainConfig.of(values())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was left in peace."""
    out = tmp_path_factory.mktemp("calm")
    return run_of(start([*SMALL, "--execution", "inprocess", "--out", str(out)], out), out)


def start(words: list[str], out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "jobs.rabtriever", "train", *words]
    log = (out / "log.txt").open("a")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True, env=env)


def run_of(process: subprocess.Popen[bytes] | None, out: Path) -> Path:
    """The run's folder, after its process has ended well."""
    if process is not None:
        assert process.wait(timeout=300) == 0, (out / "log.txt").read_text()[-3000:]
    (run,) = out.glob("rabtriever-train-*")
    return run


def test_a_run_leaves_a_summary_a_report_and_a_retriever(trained: Path) -> None:
    summary = json.loads((trained / "summary.json").read_text())
    assert summary["system"] == "rabtriever"
    assert {row["method"] for row in summary["table"]} == {"student", "teacher"}
    assert (trained / "report.html").stat().st_size > 1000
    data, retriever = load_retrieval(DATA.rstrip(")") + ",seed=0)"), Retriever.load(str(trained))
    u, c = retriever.queries(data.test.texts)
    z = retriever.documents(data.documents)
    assert u.shape == (60, 32)
    assert np.isfinite(u @ z.T + c[:, None]).all()
    found = np.mean([row.argmax() in right for row, right in zip(u @ z.T, data.test.relevant, strict=True)])
    measured = {row["metric"]: row["mean"] for row in summary["table"] if row["method"] == "student"}
    assert found == pytest.approx(measured["recall@1"])


def test_what_was_trained_is_evaluated_indexed_and_found_again(
    trained: Path, tmp_path: Path, ray_cluster: Any, monkeypatch: Any, capsys: Any
) -> None:
    words = ["evaluate", "--run", str(trained), "--no-wandb", "--out", str(tmp_path), "--rerank", "3"]
    code, _ = call(words, monkeypatch, capsys)
    assert code == 0
    (run,) = tmp_path.glob("rabtriever-evaluate-*")
    lines = (run / "trec" / "student.txt").read_text().splitlines()
    assert len(lines) == 60 * 100
    assert lines[0].split()[1] == "Q0"
    words = ["index", "--run", str(trained), "--corpus", "rationale(seed=0)", "--index", str(tmp_path / "index")]
    code, told = call(
        [*words, "--no-wandb", "--out", str(tmp_path), "--chunk", "70", "--shards", "2"], monkeypatch, capsys
    )
    assert code == 0, told.err
    root, retriever = Root.open(tmp_path / "index"), Retriever.load(str(trained))
    assert root.current() == "v1"
    data = load_retrieval("rationale(seed=0)")
    z = retriever.documents(data.documents)
    u, _ = retriever.queries(data.test.texts[:5])
    shards = [root.load("v1", s) for s in range(2)]
    assert sum(map(len, shards)) == len(data.documents)
    for row in range(5):
        both = [index.search(u[row : row + 1], 5) for index in shards]
        merged = sorted((-score, name) for scores, ids in both for score, name in zip(scores[0], ids[0], strict=True))
        exact = u[row] @ z.T
        best = [data.document_ids[i] for i in np.argsort(-exact, kind="stable")[:5]]
        np.testing.assert_allclose([-s for s, _ in merged[:5]], np.sort(exact)[::-1][:5], rtol=1e-5, atol=1e-4)
        assert [name for _, name in merged[:5]] == best


def test_a_retriever_is_not_judged_on_another_draw_of_its_task(trained: Path, monkeypatch: Any, capsys: Any) -> None:
    code, told = call(["evaluate", "--run", str(trained), "--data", "rationale(seed=7)"], monkeypatch, capsys)
    assert code == 2
    assert "another rule" in told.err


def test_workers_and_teachers_that_do_not_fit_are_refused_before_training(ray_cluster: Any, tmp_path: Path) -> None:
    config = rabtriever.TrainConfig.of({"teachers": 1000, "out": str(tmp_path)})
    session = Session(config.cluster)
    session.embedded = True
    with pytest.raises(UserError, match="1 workers and 1000 teachers need 1001 CPUs"):
        config.check_room(session)


def test_an_index_goes_on_where_a_failed_build_stopped(
    trained: Path, tmp_path: Path, ray_cluster: Any, monkeypatch: Any, capsys: Any
) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"_id": f"d{i}", "text": f"document number {i}"}) + "\n" for i in range(30)))
    words = [
        "index",
        "--run",
        str(trained),
        "--corpus",
        str(corpus),
        "--index",
        str(tmp_path / "index"),
        "--chunk",
        "10",
    ]
    words += ["--no-wandb", "--out", str(tmp_path)]
    put = Builder.put

    def fails(self: Builder, chunk: int, *rest: Any) -> None:
        if chunk == 1:
            raise OSError("the disk is full")
        put(self, chunk, *rest)

    monkeypatch.setattr(Builder, "put", fails)
    with pytest.raises(OSError, match="full"):
        call(words, monkeypatch, capsys)
    (run,) = tmp_path.glob("rabtriever-index-*")
    other = tmp_path / "other.jsonl"
    other.write_text(corpus.read_text().replace("number", "called"))
    for old, new in ((str(corpus), str(other)), ("10", "20")):
        code, told = call([new if word == old else word for word in words], monkeypatch, capsys)
        assert code == 2
        assert "holds a build of other documents, chunks, model or kind" in told.err
    written: list[int] = []
    monkeypatch.setattr(Builder, "put", lambda self, chunk, *rest: (written.append(chunk), put(self, chunk, *rest))[1])
    code, told = call(["--resume", str(run), "--no-wandb"], monkeypatch, capsys)
    assert code == 0, told.err
    assert written == [1, 2]
    root = Root.open(tmp_path / "index")
    assert len(root.load(root.current(), 0)) == 30
    code, _ = call(words, monkeypatch, capsys)
    assert code == 2  # a version that another run has made is not written again


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"_id": "b", "text": null}', "line 2 has text null; expected a text"),
        ('{"_id": "b", "title": 3, "text": "x"}', "line 2 has title 3; expected a text"),
        ('{"_id": null, "text": "x"}', "line 2 has _id null"),
        ('{"_id": true, "text": "x"}', "line 2 has _id true"),
        ('{"text": "x"}', "line 2 has _id null"),
        ('{"_id": "", "text": "x"}', "line 2 has no id"),
        ('{"_id": "b"}', "line 2 is not"),
        ("[]", "line 2 is not"),
        ('{"_id": "b", "text": "<T>"}', "line 2 has no words that a model could read"),
        ('{"_id": "b", "title": null, "text": " "}', "line 2 has no words"),
        ('{"_id": "a", "text": "x"}', "line 2 has the id 'a', which an earlier line has"),
    ],
)
def test_a_line_of_a_corpus_that_holds_no_document_is_named(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"_id": "a", "title": null, "text": "hello"}\n' + line + "\n")
    with pytest.raises(UserError, match=re.escape(said)) as told:
        read_corpus(str(path))
    assert "\n" not in str(told.value)
    path.write_text('{"id": 7, "title": null, "text": "hello"}\n\n{"_id": "b", "title": "t", "text": "x"}\n')
    assert read_corpus(str(path)) == (["7", "b"], ["hello", "t x"])


def test_the_cost_study_says_that_the_student_does_not_read_documents(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    words = ["bench", "--lengths", "8", "64", "--repeats", "3", "--width", "32", "--layers", "1", "--read", "4"]
    code, told = call([*words, "--no-wandb", "--out", str(tmp_path)], monkeypatch, capsys)
    assert code == 0, told.err
    (run,) = tmp_path.glob("rabtriever-bench-*")
    rows = json.loads((run / "results.jsonl").read_text())["result"]["rows"]
    operations = {(row["way"], row["document_length"]): row["flops"] for row in rows}
    assert operations["student", 8] == operations["student", 64]
    assert operations["teacher", 8] < operations["teacher", 64]
    assert (run / "figures" / "cost.png").exists()


def test_a_robot_plays_errands_with_every_retriever(
    trained: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    words = [
        "robot",
        "--run",
        str(trained),
        "--data",
        "skills",
        "--episodes",
        "1",
        "--no-wandb",
        "--out",
        str(tmp_path),
    ]
    code, told = call(words, monkeypatch, capsys)
    assert code == 0, told.err
    (run,) = tmp_path.glob("rabtriever-robot-*")
    rows = json.loads((run / "summary.json").read_text())["table"]
    assert {row["method"] for row in rows} == {"student", "teacher", "dense", "bm25", "random"}
    assert all(0 <= row["mean"] <= 1 for row in rows)


@pytest.mark.slow
def test_teacher_and_student_killed_in_training_end_with_the_bits_of_an_undisturbed_run(
    trained: Path, tmp_path: Path
) -> None:
    words = [*SMALL, "--execution", "inprocess", "--out", str(tmp_path), "--train.checkpoint-every", "2"]
    for stage in ("teacher", "student"):
        runs = list(tmp_path.glob("rabtriever-train-*"))
        process = start(["--resume", str(runs[0])] if runs else words, tmp_path)
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob(f"*/stages/seed0.{stage}*/checkpoints/*/manifest.json")):
            assert process.poll() is None, (tmp_path / "log.txt").read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    run = run_of(start(["--resume", str(run_of(None, tmp_path))], tmp_path), tmp_path)
    for name in ("backbone", "predictor"):
        assert (run / FOLDER / f"{name}.safetensors").read_bytes() == (
            trained / FOLDER / f"{name}.safetensors"
        ).read_bytes()


@pytest.mark.slow
def test_a_sweep_tunes_on_held_out_queries_and_shares_a_teacher(
    tmp_path: Path, ray_cluster: Any, monkeypatch: Any, capsys: Any
) -> None:
    words = ["sweep", *SMALL, "--space", "student.kl_weight=1,10", "--out", str(tmp_path)]
    code, told = call(words, monkeypatch, capsys)
    assert code == 0, told.err
    (run,) = tmp_path.glob("rabtriever-sweep-*")
    rows = json.loads((run / "summary.json").read_text())["table"]
    assert sorted(row["student.kl_weight"] for row in rows) == [1, 10]
    assert (run / "teachers" / "0.safetensors").exists()


@pytest.mark.slow
def test_a_comparison_measures_every_method(tmp_path: Path, ray_cluster: Any, monkeypatch: Any, capsys: Any) -> None:
    words = ["compare", *SMALL, "--seeds", "2", "--baseline-steps", "3", "--test", "30", "--out", str(tmp_path)]
    code, told = call(words, monkeypatch, capsys)
    assert code == 0, told.err
    (run,) = tmp_path.glob("rabtriever-compare-*")
    summary = json.loads((run / "summary.json").read_text())
    rows = {(row["method"], row["metric"], row["queries"]): row for row in summary["table"]}
    assert rows["no_mul", "recall@1", "all"]["mean"] == pytest.approx(1 / 192)
    assert rows["classifier", "recall@1", "withheld"]["mean"] == 0
    assert {method for method, _, _ in rows} >= set(rabtriever.CompareConfig.model_fields["methods"].default)
    exact = next(claim for claim in summary["claims"] if "without multiplication" in claim["claim"])
    assert exact["holds"]
