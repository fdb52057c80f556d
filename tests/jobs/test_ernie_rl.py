"""The rl command on a tiny model: both ways of running give the same bits, it resumes, it refuses, it saves what it trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs import ernie_rl
from jobs.ernie_rl import RLConfig, play
from raysys.runtime.run import Run
from raysys.runtime.sentences import UserError
from raysys.runtime.session import ClusterConfig, Session
from raysys.runtime.storage import Storage
from raysys.systems.ernie.artifact import FOLDER, Bundle, Tokenizers, describe, load, save
from raysys.systems.ernie.model import UniModel
from raysys.systems.ernie.rl.loop import Loop
from raysys.systems.ernie.setting import FormSetting, ModelSetting
from raysys.systems.ernie.tokenizers.audio import AudioCodec, AudioSetting
from raysys.systems.ernie.tokenizers.text import TextTokenizer
from raysys.systems.ernie.tokenizers.visual import VisualSetting, VisualTokenizer

SMALL = {
    "wandb": False, "seeds": 1, "every": 2,
    "warm": {"samples": 2, "steps": 40, "batch": 8, "lr": 2e-2, "weights": {"arithmetic": 4, "tones": 1, "nextframe": 3}},
    "rl": {
        "iterations": 3, "prompts": 4, "test": 2, "limit": 8, "weights": {"arithmetic": 1},
        "difficulty": {"terms": 2, "below": 20, "tones": 2},
        "buffer": {"batch": 4, "group": 2, "depth": 2, "calls": 2, "slots": 6},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An artifact of untrained parts."""
    folder = tmp_path_factory.mktemp("artifact")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    text = TextTokenizer.train(["how many? low high rising steady falling left right up down 0 1 2 3 4 5 6 7 8 9"], 300)
    tokenizers = Tokenizers(
        FormSetting(), text, VisualTokenizer(VisualSetting(width=8)).eval(), AudioCodec(AudioSetting()).eval(), "embedded",
        "-", (),
    )  # fmt: skip
    setting = ModelSetting(
        width=16, layers=4, heads=2, experts=6, active=2, expert_width=8, shared_width=8, mtp_weight=0.0
    )
    save(Storage(folder), Bundle.of(tokenizers, UniModel(setting, tokenizers.sizes).eval()))
    return str(folder)


@pytest.mark.parametrize("name", ["width", "layers", "experts", "expert_width", "shared_width"])
def test_a_description_that_asks_for_more_than_the_file_holds_is_refused_before_memory_is(
    made: str, tmp_path: Path, name: str
) -> None:
    shutil.copytree(made, tmp_path / "run")
    file = tmp_path / "run" / FOLDER / "ernie.json"
    told = json.loads(file.read_text())
    told["model"][name] = 10**9
    file.write_text(json.dumps(told))
    with pytest.raises(UserError, match=r"does not fit its ernie\.json"):
        load(str(tmp_path / "run"))


def test_questions_of_reports_are_other_draws_than_those_of_tuning(made: str) -> None:
    bundle = load(made)
    told, tuned = (
        ernie_rl.gather(RLConfig.of({**SMALL, "run": made, "tuning": tuning}), bundle).questions
        for tuning in (False, True)
    )
    seeds = [{(one.name, one.seed) for one in questions.test} for questions in (told, tuned)]
    assert len(seeds[0]) == len(seeds[1]) == len(told.test)
    assert not seeds[0] & seeds[1]
    assert [one.seed for one in told.train] == [one.seed for one in tuned.train]


def test_ways_of_training_that_cannot_be_are_refused_before_questions_are_read(made: str) -> None:
    for values, said in (
        ({"execution": "inprocess", "train": {"deepspeed": "zero1"}}, "it needs actors"),
        ({"warm": {"blocks": 4}, "train": {"workers": 4, "deepspeed": "zero1", "expert_parallel": 4}}, "the 6 experts"),
    ):
        with pytest.raises(ValueError, match=said):
            RLConfig.of({**SMALL, "run": made, **values}).check()


def ran(made: str, out: Any, session: Session, **values: Any) -> tuple[bytes, dict[str, Any], str]:
    """The weights that a run leaves, its results, and its folder."""
    config = RLConfig.of({**SMALL, "run": made, "out": str(out), **values})
    config.check()
    with Run.open(config, system="ernie", command="rl") as run:
        ernie_rl.rl(config, run, session)
        return run.storage.read_bytes(f"{FOLDER}/model.safetensors"), json.loads(json.dumps(run.results)), run.path


def test_actors_give_the_bits_of_one_process_and_the_run_tells_all(ray_cluster: Any, made: str, tmp_path: Path) -> None:
    session = Session(ClusterConfig())
    same = {"arms": ["synchronous", "hints"], "train": {"cpus_per_worker": 0.5}}
    alone = ran(made, tmp_path, session, execution="inprocess", **same)
    spread = ran(made, tmp_path, session, execution="actors", rollout_actors=2, cpus_per_actor=0.25, **same)
    assert spread[0] == alone[0]
    assert spread[1] == alone[1]
    assert max(alone[1]["seed0/base"]["rows"]["gradient"]) > 0  # some answers were right: reinforcement did something
    assert set(alone[1]) == {"seed0/base", "seed0/synchronous", "seed0/hints"}
    summary = json.loads((Path(alone[2]) / "summary.json").read_text())
    assert [claim["holds"] for claim in summary["claims"]] == [
        False
    ] * 4  # one seed has no interval: nothing is claimed
    assert {row.get("arm") for row in summary["table"]} == {"base", "synchronous", "hints"}
    assert summary["figures"] == ["figures/reinforcement.png"]
    assert load(alone[2]).model.setting == load(made).model.setting
    assert describe(alone[2]).files["text.json"] == describe(made).files["text.json"]
    assert alone[0] != (Path(made) / FOLDER / "model.safetensors").read_bytes()


def test_a_run_that_was_stopped_ends_with_the_same_bits(
    made: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(ClusterConfig())
    whole = ran(made, tmp_path, session, execution="inprocess")
    iterate = Loop.iterate

    def stopped(self: Loop) -> dict[str, float]:
        if self.iteration == 2:
            raise KeyboardInterrupt
        return iterate(self)

    monkeypatch.setattr(Loop, "iterate", stopped)
    with pytest.raises(KeyboardInterrupt):
        ran(made, tmp_path / "again", session, execution="inprocess")
    monkeypatch.setattr(Loop, "iterate", iterate)
    (folder,) = (tmp_path / "again").iterdir()
    asked = []
    monkeypatch.setattr(ernie_rl, "play", lambda loop, *rest: (asked.append(loop), play(loop, *rest))[1])
    config = RLConfig.load(folder / "config.yaml").with_values({"resume": str(folder)})
    with Run.open(config, system="ernie", command="rl") as run:
        ernie_rl.rl(config, run, session)
        assert run.storage.read_bytes(f"{FOLDER}/model.safetensors") == whole[0]
        assert json.loads(json.dumps(run.results)) == whole[1]
    assert len(asked) == 1  # the warm start was not repeated, reinforcement went on


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"arms": ["sync"]}, "arms: got 'sync'"),
        ({"train": {"workers": 3}}, "train.workers: got 3; it must divide warm.blocks"),
        ({"run": "/nowhere"}, "run: got /nowhere"),
        ({"rl": {"minibatches": 3}}, "minibatches: got 3; it must divide"),
        ({"rl": {"environments": ["count", "count"]}}, "environments: got"),
        ({"rl": {"objective": {"lower": 9.0}}}, "lower: got 9"),
        ({"warm": {"batch": 9}}, "blocks: got 2; it must divide batch"),
    ],
)
def test_what_cannot_be_run_is_refused_in_a_sentence(made: str, values: dict[str, Any], says: str) -> None:
    with pytest.raises((ValueError, UserError), match=says):
        RLConfig.of({"run": made, **values}).check()
