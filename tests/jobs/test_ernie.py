"""The ERNIE job: what it refuses, what it writes, and that neither workers nor kills nor engines change what is learned."""

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

import pytest
import torch

from jobs import ernie, ernie_studies
from jobs.ernie_config import ErnieConfig
from jobs.ernie_elastic import OTHERS
from jobs.ernie_stages import held_out
from raysys.data.multimodal import Form, load_multimodal
from raysys.runtime.session import ClusterConfig, Session
from raysys.runtime.storage import Storage
from raysys.systems.ernie.artifact import Bundle, load, load_tokenizers, save
from raysys.systems.ernie.model import UniModel
from raysys.systems.ernie.setting import Counts
from raysys.systems.ernie.study import ladder, variant

ROOT = Path(__file__).resolve().parents[2]
TASKS = ("lm", "t2i", "i2t", "t2v", "v2t", "t2a", "a2t")


def samples(count: int) -> list[str]:
    """Flags for so many samples of each task in a block."""
    return [word for task in TASKS for word in (f"--pretrain.samples.{task}", str(count))]


SMALL = [
    "--no-wandb", "--items", "8", "--form.tones", "12", "--form.videos", "12", "--form.held-out", "6", "--text.size", "300",
    "--visual.width", "8", "--visual.image-steps", "4", "--visual.video-steps", "2", "--visual.batch", "8",
    "--audio.width", "16", "--audio.steps", "4", "--audio.batch", "4",
    "--model.width", "32", "--model.layers", "5", "--model.heads", "2", "--model.experts", "8", "--model.active", "2",
    "--model.expert-width", "8", "--model.shared-width", "16", "--pretrain.steps", "6", "--pretrain.blocks", "2",
    "--pretrain.row", "256", *samples(1),
]  # fmt: skip
REFUSED = {
    "no such data": ["pretrain", "--data", "nowhere"],
    "workers that do not divide the blocks": ["pretrain", "--train.workers", "3"],
    "experts shared out without DeepSpeed": [
        "pretrain", "--train.workers", "2", "--pretrain.blocks", "2", "--train.expert-parallel", "2",
    ],
    "more active experts than there are": ["pretrain", "--model.active", "100"],
    "a width that the heads do not divide": ["pretrain", "--model.width", "90"],
    "no samples at all": ["pretrain", *samples(0)],
    "another rate of the codec": ["pretrain", "--audio.rate", "8000"],
    "a wave that no frames divide": ["pretrain", "--form.samples", "2000"],
    "a canvas that is too small": ["pretrain", "--form.height", "8"],
    "fewer layers than code levels": ["pretrain", "--model.layers", "3"],
    "a canvas that the stride does not divide": ["pretrain", "--form.height", "18", "--form.width", "18"],
    "a video that no windows divide": ["pretrain", "--form.frames", "6", "--pretrain.row", "400"],
    "rows too short for a video": ["pretrain", "--form.height", "32", "--form.width", "32"],
    "auxiliary losses of pools": ["pretrain", "--model.routing", "separated", "--model.balance", "aux"],
    "DeepSpeed in this process": ["pretrain", "--execution", "inprocess", "--train.deepspeed", "zero1"],
    "experts that the groups do not divide": [
        "pretrain", "--train.workers", "6", "--pretrain.blocks", "6", "--train.expert-parallel", "6",
        "--train.deepspeed", "zero1",
    ],
    "a study in this process": ["elastic", "--execution", "inprocess"],
    "a study by several workers": ["elastic", "--train.workers", "2", "--pretrain.blocks", "2"],
    "a variant that cannot be": ["elastic", "--model.balance", "both"],
    "a sweep in this process": ["sweep", "--execution", "inprocess"],
    "export without a run": ["export"],
    "rows too short for a sound": ["pretrain", "--form.samples", "32768"],
    "rows too short for an image": [
        "pretrain", "--form.height", "64", "--form.width", "64", "--pretrain.samples.t2v", "0", "--pretrain.samples.v2t", "0",
    ],
    "a study on GPUs": ["elastic", "--train.gpus-per-worker", "1"],
    "an unknown variant": ["elastic", "--others", "sparse"],
    "evaluate without a run": ["evaluate"],
    "evaluate what is no run": ["evaluate", "--run", "/nowhere"],
    "experts without a run": ["experts"],
    "an unknown field of a sweep": ["sweep", "--space", "model.size=1,2"],
    "an unknown metric": ["sweep", "--metric", "accuracy"],
}  # fmt: skip


def call(words: list[str], monkeypatch: Any, capsys: Any) -> tuple[int, Any]:
    monkeypatch.setattr(sys, "argv", ["jobs.ernie", *words])
    code = 0
    try:
        ernie.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    return code, capsys.readouterr()


@pytest.mark.parametrize("words", REFUSED.values(), ids=REFUSED)
def test_bad_input_gets_one_sentence_and_leaves_nothing(words, monkeypatch, capsys, tmp_path):
    code, said = call([*words, "--out", str(tmp_path)], monkeypatch, capsys)
    assert code == 2
    assert said.err.startswith("error: ")
    assert len(said.err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def done(words: list[str], monkeypatch: Any, capsys: Any) -> Path:
    code, said = call(words, monkeypatch, capsys)
    assert code == 0, said.err
    last = said.out.strip().splitlines()[-1]
    assert last.startswith("run: ")
    return Path(last.removeprefix("run: "))


def weights(run: Path) -> bytes:
    return (run / "ernie" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small pre-training in this process."""
    out = tmp_path_factory.mktemp("plain")
    words = ["pretrain", *SMALL, "--test", "4", "--execution", "inprocess", "--out", str(out)]
    found = subprocess.run(
        [sys.executable, "-m", "jobs.ernie", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    return Path(found.stdout.strip().splitlines()[-1].removeprefix("run: "))


def test_a_run_leaves_an_artifact_a_table_and_claims(plain):
    summary = json.loads((plain / "summary.json").read_text())
    assert summary["system"] == "ernie"
    metrics = {row["metric"] for row in summary["table"]}
    assert {
        "lm bits per byte",
        "i2t digit",
        "t2i digit",
        "v2t direction",
        "t2v error",
        "a2t shape",
        "t2a shape",
    } <= metrics
    assert all({"claim", "source", "holds", "figure", "interval"} <= claim.keys() for claim in summary["claims"])
    bundle = load(str(plain))
    assert bundle.model.setting.experts == 8
    assert bundle.tasks == TASKS


def test_two_ray_train_workers_and_ray_data_give_the_same_bits(plain, ray_cluster, tmp_path):
    config = ernie.PretrainConfig.of(values(tmp_path) | {"train": {"workers": 2, "clip": 1.0}, "test": 4})
    with ernie_run(config, "pretrain") as (run, session):
        ernie.pretrain(config, run, session)
        assert run.storage.read_bytes("ernie/visual.safetensors") == (plain / "ernie/visual.safetensors").read_bytes()
        assert run.storage.read_bytes("ernie/model.safetensors") == weights(plain)


@pytest.mark.slow
def test_killed_anywhere_and_resumed_it_ends_with_the_same_bits(plain, tmp_path):
    """SIGKILL while the tokenizers, then while the backbone is trained."""
    words = [
        sys.executable,
        "-m",
        "jobs.ernie",
        "pretrain",
        *SMALL,
        "--test",
        "4",
        "--execution",
        "inprocess",
        "--out",
        str(tmp_path),
    ]
    more, killed = ["--train.checkpoint-every", "1"], 0
    for mark in ("stages/visual-", "stages/seed0.backbone-"):
        job = subprocess.Popen([*words, *more], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and job.poll() is None:
            if any(mark in str(path) for path in tmp_path.glob("*/stages/*/checkpoints/*/state.safetensors")):
                os.kill(job.pid, signal.SIGKILL)
                killed += 1
                break
            time.sleep(0.02)
        job.wait()
        (run,) = tmp_path.iterdir()
        words, more = [sys.executable, "-m", "jobs.ernie", "pretrain", "--resume", str(run)], []
    subprocess.run(words, cwd=ROOT, check=True, capture_output=True)
    assert killed == 2
    assert weights(run) == weights(plain)


def values(out: Path) -> dict[str, Any]:
    """SMALL as a configuration."""
    found: dict[str, Any] = {"wandb": False, "out": str(out)}
    for name, value in zip(SMALL[1::2], SMALL[2::2], strict=True):
        *groups, last = name.removeprefix("--").replace("-", "_").split(".")
        place = found
        for group in groups:
            place = place.setdefault(group, {})
        place[last] = int(value)
    return found


class ernie_run:
    """A run and a session on the tests' Ray."""

    def __init__(self, config: Any, command: str) -> None:
        from raysys.runtime.run import Run

        self.run, self.session = Run.open(config, system="ernie", command=command), Session(ClusterConfig())

    def __enter__(self) -> tuple[Any, Session]:
        return self.run, self.session

    def __exit__(self, *error: Any) -> None:
        self.run.close("finished" if error[0] is None else "failed")


@pytest.mark.slow
def test_deepspeed_with_shared_experts_gives_the_same_model_up_to_rounding(plain, ray_cluster, tmp_path):
    """Ray Train, two workers, ZeRO-1, every layer's experts cut in two: losses of the last step agree (seen: to 1e-5). A wrong
    scale of gradients would show with SGD only, see tests/runtime/test_expert_training.py."""
    spread = {"workers": 2, "clip": 1.0, "deepspeed": "zero1", "expert_parallel": 2}
    config = ernie.PretrainConfig.of(values(tmp_path) | {"train": spread, "test": 4, "tokenizers": str(plain)})
    with ernie_run(config, "pretrain") as (run, session):
        ernie.pretrain(config, run, session)
        found, wanted = load(run.path).model, load(str(plain)).model
    last, wished = (json.loads((Path(p) / "metrics.jsonl").read_text().splitlines()[-1]) for p in (run.path, plain))
    for task in TASKS:
        assert last[task] == pytest.approx(wished[task], abs=1e-3)
    far = [
        float((a - b).abs().max())
        for a, b in zip(found.state_dict().values(), wanted.state_dict().values(), strict=True)
    ]
    assert found.layers[0].moe.w_in.shape == (8, 32, 16)  # whole again, whatever each worker held
    assert sum(one < 1e-4 for one in far) > 0.8 * len(far)
    batch = torch.randn(5, 32)
    for a, b in zip(found.layers, wanted.layers, strict=True):
        assert torch.allclose(a.moe(batch)[0], b.moe(batch)[0], atol=0.05)


@pytest.mark.slow
def test_the_tour_shows_everything(monkeypatch, capsys, tmp_path):
    run = done(["demo", *SMALL, "--test", "4", "--execution", "inprocess", "--out", str(tmp_path)], monkeypatch, capsys)
    page = (run / "report.html").read_text()
    assert "specialist" in page
    for name in ("images", "frames", "tones", "entropy", "overlap", "usage"):
        assert (run / f"figures/{name}.png").stat().st_size > 1000
    assert (run / "figures/tone.wav").read_bytes()[:4] == b"RIFF"


@pytest.mark.slow
def test_the_elastic_study_compares_all_ways(plain, ray_cluster, tmp_path):
    config = ernie.ElasticConfig.of(
        values(tmp_path)
        | {
            "seeds": 2,
            "others": list(OTHERS),
            "test": 4,
            "tokenizers": str(plain),
            "model": {**values(tmp_path)["model"], "layers": 6},
        }
    )
    with ernie_run(config, "elastic") as (run, session):
        ernie.elastic(config, run, session)
        told = {claim["claim"] for claim in run.claims}
        assert any("pruned" in one for one in told)
        assert any("trained alone" in one for one in told)
        assert any("separated" in one for one in told)
        assert {row["trained"] for row in run.table} >= {"elastic", "plain", *OTHERS, "alone k = 1"}


def test_a_sweep_measures_every_trial(plain, ray_cluster, monkeypatch, tmp_path):
    given = values(tmp_path) | {
        "space": ["model.bias_speed=1e-3,3e-3"], "search": "grid", "samples": 1, "test": 4, "tokenizers": str(plain),
    }  # fmt: skip
    kind, sweep = ernie.STUDIES["sweep"]
    config, asked = kind.of(given), []
    monkeypatch.setattr(ernie_studies, "held_out", lambda *given: asked.append(given[3:]) or held_out(*given))
    with ernie_run(config, "sweep") as (run, session):
        sweep(config, run, session)
        assert asked == [(True,)]  # on other items than those that reports are about
        assert [row["metric"] for row in run.table] == ["mean_log_loss"] * 2
        assert sorted(row["model.bias_speed"] for row in run.table) == [1e-3, 3e-3]


def test_experts_and_evaluate_read_an_artifact(plain, monkeypatch, capsys, tmp_path):
    run = done(
        ["experts", "--no-wandb", "--run", str(plain), "--test", "4", "--out", str(tmp_path)], monkeypatch, capsys
    )
    assert (run / "figures/overlap.png").exists()
    run = done(
        ["evaluate", "--no-wandb", "--run", str(plain), "--test", "4", "--sub", "all", "--out", str(tmp_path)],
        monkeypatch,
        capsys,
    )
    rows = json.loads((run / "summary.json").read_text())["table"]
    assert {"whole", "k = 1", "half the experts"} <= {row["sub_model"] for row in rows}


def test_an_exported_sub_model_is_a_run_of_its_own_and_equals_the_view(plain, monkeypatch, capsys, tmp_path):
    """Of an untrained model of six layers, one of which can be left out."""
    torch.manual_seed(0)
    tokenizers = load_tokenizers(str(plain))
    setting = load(str(plain)).model.setting.with_values({"layers": 6})
    counts = Counts(**dict.fromkeys(TASKS, 1))
    save(Storage(tmp_path / "whole"), Bundle.of(tokenizers, UniModel(setting, tokenizers.sizes).eval(), counts))
    common = ["--no-wandb", "--run", str(tmp_path / "whole"), "--test", "4", "--out", str(tmp_path / "out")]
    run = done(["export", *common, "--dropped", "1", "--share", "0.5", "--active", "1"], monkeypatch, capsys)
    own = load(str(run))
    assert (own.model.setting.layers, own.model.setting.experts, own.model.setting.active) == (5, 4, 1)
    assert own.samples == counts
    page = (run / "report.html").read_text()
    view, exported = (
        re.findall(r"<td>([^<]*)</td>", page[page.index(f"<td>{name}</td>") :].split("</tr>")[0])[1:]
        for name in ("view", "exported")
    )
    assert view == exported
    assert exported[0] == f"{sum(p.numel() for p in own.model.parameters()):,}"
    again = ["evaluate", "--no-wandb", "--run", str(run), "--test", "4", "--out", str(tmp_path / "out")]
    told = json.loads((done(again, monkeypatch, capsys) / "summary.json").read_text())
    assert {row["sub_model"] for row in told["table"]} == {"whole"}
    for wrong, said in ((["--dropped", "2"], "dropped: got 2"), (["--share", "0.1", "--active", "2"], "active: got 2")):
        code, heard = call(["export", *common, *wrong], monkeypatch, capsys)
        assert code == 2
        assert said in heard.err


def test_sweeps_choose_on_items_that_no_report_uses(plain):
    bundle = load(str(plain))
    data = load_multimodal(bundle.data, 0, Form(**bundle.form.model_dump()))

    def shown(tuning: bool) -> set[bytes]:
        found = held_out(data, bundle, 3, tuning)
        assert {task: len(tested.items) for task, tested in found.items()} == dict.fromkeys(TASKS, 3)
        return {
            (x.text if x.frames is None else "").encode()
            + b"".join(a.tobytes() for a in (x.frames, x.wave) if a is not None)
            for tested in found.values()
            for x in tested.items
        }

    assert not shown(False) & shown(True)


def test_variants_have_equal_steps_and_the_sizes_they_say():
    config = ErnieConfig()
    for name in ("plain", "separated", "dense", "unbalanced", "auxiliary", "alone k = 1", "alone half the experts"):
        _, pretrain = variant(name, config.model, config.pretrain, 4)
        assert pretrain.steps == config.pretrain.steps
        assert pretrain.elastic.off
    assert variant("alone k = 1", config.model, config.pretrain, 4)[0].active == 1
    assert (
        variant("dense", config.model, config.pretrain, 4)[0].expert_width
        == config.model.active * config.model.expert_width
    )
    assert ladder(config.model, 4)[0].label == "whole"
