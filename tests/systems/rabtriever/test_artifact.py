"""What a run leaves is loaded whole or refused in one sentence; LoRA factors are merged into it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from raysys.runtime.sentences import UserError
from raysys.runtime.storage import Storage
from raysys.runtime.train import TrainConfig, fit_here
from raysys.systems.rabtriever.artifact import Retriever, fingerprint, load_teacher, save_student, save_teacher
from raysys.systems.rabtriever.backbone import Backbone
from raysys.systems.rabtriever.learners import TeacherLearner
from raysys.systems.rabtriever.predictor import Predictor
from raysys.systems.rabtriever.reader import Reader, make_backbone, make_reader, merged
from raysys.systems.rabtriever.setting import StudentSetting, TeacherSetting
from raysys.systems.rabtriever.task import Problem
from raysys.systems.rabtriever.teacher import Reranker, digest

QUERIES = ["what now? the harbour is freezing", "people say that the dock is broken", "we are at the pier"]
DOCUMENTS = ["choose the falcon", "the saffron together with the falcon and the old pier", "tin", "a dock"]
STUDENT = StudentSetting(hidden=8)


def predictor_for(reranker: Reranker, reader: Reader) -> Predictor:
    torch.manual_seed(5)
    made = Predictor(reranker.backbone.width, STUDENT.combine, STUDENT.additive, STUDENT.layers, STUDENT.hidden)
    made.standardise("query", reranker.queries(reader.queries(QUERIES)))
    made.standardise("document", reranker.documents(reader.documents(DOCUMENTS)))
    return made


def leave(folder: Path, setting: TeacherSetting, backbone: Backbone, reader: Reader) -> Predictor:
    """An artifact in a folder, as a run leaves it."""
    storage = Storage(str(folder))
    backbone.eval().requires_grad_(False)
    predictor = predictor_for(Reranker(backbone), reader)
    save_teacher(storage, setting, backbone, reader)
    save_student(storage, setting, STUDENT, predictor, fingerprint(setting, backbone, reader), "rule", "none")
    return predictor


def settings_of(kind: str, model_folder: Callable[..., Path]) -> TeacherSetting:
    if kind == "bridge":
        return TeacherSetting(width=16, layers=1)
    if kind == "chunks":
        return TeacherSetting(width=16, layers=1, units="chunks", chunks=3)
    name, _, tied = kind.partition(" ")
    return TeacherSetting(model=str(model_folder(name, bool(tied))), max_document=24, max_query=200)


@pytest.fixture(scope="session")
def bridge_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    setting = TeacherSetting(width=16, layers=1)
    reader = make_reader(setting)
    leave(folder, setting, make_backbone(setting, reader, 3), reader)
    return folder


@pytest.fixture
def damaged(bridge_run: Path, tmp_path: Path) -> Path:
    """A copy of an artifact, to be spoiled."""
    folder = tmp_path / "retriever"
    folder.mkdir()
    for file in (bridge_run / "retriever").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


KINDS = ["bridge", "chunks", "qwen2", "qwen2 tied", "gpt2 tied", "gpt2"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_retriever_gives_the_vectors_and_scores_of_the_one_that_was_saved(
    kind: str, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    setting = settings_of(kind, model_folder)
    reader = make_reader(setting)
    backbone = make_backbone(setting, reader, 3)
    folder = tmp_path / "a run with spaces, 100 % ünïcode"
    predictor = leave(folder, setting, backbone, reader)
    if setting.model != "bridge":  # what it was made from is not needed any more
        setting_away = json.loads((folder / "retriever/teacher.json").read_text())
        setting_away["model"] = "/nowhere"
        (folder / "retriever/teacher.json").write_text(json.dumps(setting_away))
    found = Retriever.load(str(folder))
    reranker = Reranker(backbone)
    states = reranker.queries(reader.queries(QUERIES))
    u, c = predictor.fold(states, backbone.direction)
    found_u, found_c = found.queries(QUERIES)
    z = reranker.documents(reader.documents(DOCUMENTS))
    np.testing.assert_array_equal(found.documents(DOCUMENTS), z.numpy())
    np.testing.assert_array_equal(found_u, u.detach().numpy())
    np.testing.assert_array_equal(found_c, c.detach().numpy())
    expected = reranker.matrix(reader.documents(DOCUMENTS), reader.queries(QUERIES[:1]))[0]
    np.testing.assert_array_equal(found.rerank(QUERIES[0], DOCUMENTS), expected)
    assert found.name == folder.name
    assert found.width == backbone.width
    assert found.documents(DOCUMENTS).dtype == found_u.dtype == found_c.dtype == np.float32
    assert found.prompt("q", "d <T>").startswith("Document: d\nQuery: q\nCan Query")
    with pytest.raises(ValueError, match="query: number 1 is empty"):
        found.queries(["fine", " "])
    for ask in (found.queries, found.documents, lambda texts: found.rerank("fine", texts)):
        with pytest.raises(ValueError, match="texts: got none"):
            ask([])


def test_loading_changes_no_weight_and_trains_nothing(bridge_run: Path) -> None:  # (4)
    _, backbone, _ = load_teacher(Storage(str(bridge_run)))
    _, again, _ = load_teacher(Storage(str(bridge_run)))
    assert digest(backbone) == digest(again)
    assert not any(p.requires_grad for p in backbone.parameters())
    assert not backbone.training


def test_nothing_is_unpickled(bridge_run: Path, damaged: Path) -> None:
    for name in ("backbone.bin", "pytorch_model.bin", "predictor.pt", "backbone.pkl"):
        (damaged / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    found = Retriever.load(str(damaged.parent))
    np.testing.assert_array_equal(found.documents(DOCUMENTS), Retriever.load(str(bridge_run)).documents(DOCUMENTS))


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as told:
        Retriever.load(str(folder.parent))
    text = str(told.value)
    assert "\n" not in text
    assert text.startswith(("run: ", str(folder)))
    return text


@pytest.mark.parametrize("name", ["backbone.safetensors", "predictor.safetensors"])
@pytest.mark.parametrize("place", [-1, -100, 3, 40])
def test_a_single_changed_bit_in_the_weights_is_refused(damaged: Path, name: str, place: int) -> None:
    content = bytearray((damaged / name).read_bytes())
    content[place] ^= 1
    (damaged / name).write_bytes(content)
    assert "damaged" in refused(damaged)
    assert name in refused(damaged)


@pytest.mark.parametrize("name", ["backbone.safetensors", "predictor.safetensors", "teacher.json", "retriever.json"])
def test_missing_and_cut_files_are_refused(damaged: Path, name: str) -> None:
    content = (damaged / name).read_bytes()
    (damaged / name).write_bytes(content[: len(content) // 2])
    assert name in refused(damaged)
    (damaged / name).unlink()
    assert name in refused(damaged)


def test_an_empty_folder_and_none_at_all_are_refused(tmp_path: Path) -> None:
    assert "there is no" in refused(tmp_path / "retriever")
    assert "there is no" in refused(tmp_path / "nowhere" / "retriever")


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_other_formats_and_descriptions_are_refused(damaged: Path) -> None:
    good = (damaged / "retriever.json").read_text()
    change(damaged / "retriever.json", format=2)
    assert "format 2, this version reads 1" in refused(damaged)
    for bad in ("[]", '"text"', "null", "{", "\xff", '{"format": 1}'):
        (damaged / "retriever.json").write_text(bad, encoding="latin-1")
        assert "retriever.json" in refused(damaged)
    (damaged / "retriever.json").write_text(good)
    change(damaged / "teacher.json", format=7)
    assert "teacher.json is not of format 1" in refused(damaged)
    change(damaged / "teacher.json", format=1, files=[])
    assert "teacher.json is not of format 1" in refused(damaged)


def test_a_predictor_of_another_teacher_is_refused(damaged: Path, tmp_path: Path) -> None:
    setting = TeacherSetting(width=16, layers=1)
    reader = make_reader(setting)
    save_teacher(Storage(str(damaged.parent)), setting, make_backbone(setting, reader, 4), reader)
    assert "not the one that the predictor was trained with" in refused(damaged)


def test_an_encoder_that_is_another_one_now_is_refused(damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from raysys.nn.pretrained import read_base
    from raysys.systems.rabtriever import reader

    other = read_base()
    with torch.no_grad():
        next(other.model.parameters()).view(-1)[7] += 1
    monkeypatch.setattr(reader, "load_base", lambda name, device: other)
    assert "its teacher or encoder is not the one" in refused(damaged)


def test_an_encoder_that_is_not_there_is_refused(damaged: Path) -> None:
    teacher = json.loads((damaged / "teacher.json").read_text())
    change(damaged / "teacher.json", encoder="/nowhere/at/all")
    change(
        damaged / "retriever.json",
        teacher={**{k: v for k, v in teacher.items() if k not in ("format", "files")}, "encoder": "/no"},
    )
    assert "frozen encoder is not here" in refused(damaged)


def test_a_damaged_tokenizer_or_configuration_of_a_language_model_is_refused(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    setting = settings_of("qwen2", model_folder)
    reader = make_reader(setting)
    leave(tmp_path, setting, make_backbone(setting, reader, 3), reader)
    model = tmp_path / "retriever/model"
    (model / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    Retriever.load(str(tmp_path))
    for name in ("config.json", "tokenizer.json"):
        good = (model / name).read_bytes()
        (model / name).write_bytes(good.replace(b"2", b"3", 1))
        assert name in refused(tmp_path / "retriever")
        (model / name).unlink()
        assert name in refused(tmp_path / "retriever")
        (model / name).write_bytes(good)


def test_fingerprints_tell_apart_what_vectors_depend_on_and_nothing_else() -> None:
    setting = TeacherSetting(width=16, layers=1)
    reader = make_reader(setting)
    backbone = make_backbone(setting, reader, 0)
    mark = fingerprint(setting, backbone, reader)
    assert mark == fingerprint(setting.with_values({"lr": 1.0, "steps": 3}), backbone, reader)
    assert mark != fingerprint(setting.with_values({"max_document": 31}), backbone, reader)
    assert mark != fingerprint(setting.with_values({"units": "chunks"}), backbone, reader)
    assert mark != fingerprint(setting, make_backbone(setting, reader, 1), reader)
    swapped = copy.deepcopy(backbone)
    swapped.labels = swapped.labels[::-1]
    assert mark != fingerprint(setting, swapped, reader)


@pytest.mark.parametrize("kind", ["qwen2", "qwen2 tied", "gpt2 tied"])
def test_only_lora_factors_train_and_merged_they_give_the_same_scores_as_a_plain_model(
    kind: str, model_folder: Callable[..., Path], rule: Problem, tmp_path: Path
) -> None:
    setting = settings_of(kind, model_folder).with_values(
        {"lora_rank": 2, "steps": 6, "batch": 4, "negatives": 2, "lr": 5e-2}
    )
    reader = make_reader(setting)
    plain = make_backbone(setting.with_values({"lora_rank": 0}), reader, 0)
    documents = reader.documents([f"choose the {'pier' if i % 2 else 'dock'} {i}" for i in range(12)])
    queries = reader.queries([f"what now? {i}" for i in range(240)])

    def make(device: str) -> TeacherLearner:
        return TeacherLearner(setting, make_backbone(setting, reader, 0), rule.examples, documents, queries, 0)

    trained = {name for name, p in make("cpu").module.named_parameters() if p.requires_grad}
    assert trained
    assert all(".lora_A." in name or ".lora_B." in name for name in trained)
    backbone = make_backbone(setting, reader, 0)
    told = backbone.load_state_dict(fit_here(None, make, TrainConfig()), strict=False)
    assert not told.unexpected_keys
    with pytest.raises(ValueError, match="LoRA factors; merge them"):
        save_teacher(Storage(str(tmp_path)), setting, backbone, reader)
    few = queries.pick(torch.arange(3))
    before = Reranker(backbone).matrix(documents, few)
    untrained = Reranker(plain).matrix(documents, few)
    assert np.abs(before - untrained).max() > 1e-2, "training must have changed something"
    single = merged(backbone)
    assert single.state_dict().keys() == plain.state_dict().keys()
    np.testing.assert_allclose(Reranker(single).matrix(documents, few), before, atol=1e-5, rtol=1e-5)
    assert merged(single) is single
    leave(tmp_path, setting, single, reader)
    found = Retriever.load(str(tmp_path))
    np.testing.assert_allclose(found.rerank("what now? 1", ["choose the pier 1"]), before[1, 1:2], atol=1e-5, rtol=1e-5)


def test_the_reference_of_preferences_has_frozen_factors(model_folder: Callable[..., Path], rule: Problem) -> None:
    setting = settings_of("qwen2", model_folder).with_values(
        {"lora_rank": 2, "dpo_steps": 2, "batch": 4, "negatives": 2}
    )
    reader = make_reader(setting)
    documents, queries = reader.documents(DOCUMENTS * 3), reader.queries(QUERIES * 80)
    learner = TeacherLearner(
        setting, make_backbone(setting, reader, 0), rule.examples, documents, queries, 0, preferences=True
    )
    assert torch.isfinite(learner.loss(0, 0))
    assert learner.reference is not None
    assert not any(p.requires_grad for p in learner.reference.parameters())


def test_weights_of_tied_and_untied_tables_are_saved_as_they_are(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    for kind in ("qwen2", "qwen2 tied"):
        setting = settings_of(kind, model_folder)
        reader = make_reader(setting)
        backbone = make_backbone(setting, reader, 0)
        save_teacher(Storage(str(tmp_path)), setting, backbone, reader)
        held = safetensors.torch.load_file(tmp_path / "retriever/backbone.safetensors")
        assert held.keys() == backbone.state_dict().keys()
        _, loaded, _ = load_teacher(Storage(str(tmp_path)))
        table: Any = loaded.body.get_input_embeddings()
        assert (table.weight is loaded.head.weight) == (kind == "qwen2 tied")
        assert digest(loaded) == digest(backbone)
