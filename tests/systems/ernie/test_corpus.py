"""Samples and shards: what goes in comes out, damage is noticed, what is kept after a kill is what belongs."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import raysys.systems.ernie.corpus as module
from raysys.data.multimodal import Form, load_multimodal
from raysys.runtime.checkpoint import CheckpointError
from raysys.runtime.sentences import UserError
from raysys.runtime.storage import Storage
from raysys.systems.ernie.corpus import FOLDER, Corpus, kept, make_shard, plan, read_shard, write_shard
from raysys.systems.ernie.samples import fingerprint, samples_of
from raysys.systems.ernie.stream import Audio, Look, Sample, Text, Vision
from raysys.systems.ernie.tokenizers.audio import AudioSetting
from raysys.systems.ernie.tokenizers.audio_training import AudioLearner
from raysys.systems.ernie.tokenizers.text import TextTokenizer
from raysys.systems.ernie.tokenizers.visual import VisualSetting
from raysys.systems.ernie.tokenizers.visual_training import VisualLearner

DATA = load_multimodal(form=Form(tones=40, videos=30, samples=512))
LIMITS = {"lm": 70, "t2i": 35, "i2t": 33}
SIZE = 16


def codecs(seed: int = 0) -> SimpleNamespace:
    """Tokenizers that have seen one batch: good enough for plumbing."""
    images = torch.from_numpy(np.stack([x.frames[0] for x in DATA.train("t2i")[:32]]))
    waves = torch.from_numpy(np.stack([x.wave for x in DATA.train("t2a")[:32]]))
    visual = VisualLearner(VisualSetting(width=8, bits=6), images, seed=seed)
    audio = AudioLearner(AudioSetting(width=16, codes=8), waves, seed=seed)
    visual.before(0)
    audio.before(0)
    return SimpleNamespace(
        text=TextTokenizer.train(["a seven at the top left"], 280), visual=visual.module, audio=audio.module
    )


CODECS = codecs()


def made(storage: Storage) -> Corpus:
    wanted = plan(CODECS, DATA, LIMITS, SIZE)
    digests = {s.file: make_shard(storage, CODECS, DATA.train(s.task), s, wanted.fingerprint) for s in wanted.shards}
    return Corpus.commit(storage, wanted, digests, SIZE)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return made(Storage(tmp_path_factory.mktemp("corpus")))


def same(a: Sample, b: Sample, half: bool = True) -> bool:
    """Whether samples are equal; looked-at arrays up to half precision."""
    if a.task != b.task or [type(s) for s in a.segments] != [type(s) for s in b.segments]:
        return False
    for one, other in zip(a.segments, b.segments, strict=True):
        for name in one.__dataclass_fields__:
            left, right = getattr(one, name), getattr(other, name)
            if isinstance(left, np.ndarray):
                tolerance = 2e-3 if isinstance(one, Look) and half else 0
                if left.dtype != right.dtype or not np.allclose(left, right, rtol=tolerance, atol=tolerance):
                    return False
            elif left != right:
                return False
    return True


def test_samples_have_the_segments_of_their_task() -> None:
    expected = {
        "lm": (Text,), "t2i": (Text, Vision), "i2t": (Look, Text), "t2v": (Text, Vision), "v2t": (Look, Text),
        "t2a": (Text, Audio), "a2t": (Audio, Text),
    }  # fmt: skip
    for task, kinds in expected.items():
        sample = samples_of(CODECS, list(DATA.train(task)[:3]))[2]
        assert sample.task == task
        assert tuple(type(s) for s in sample.segments) == kinds
        item, last = DATA.train(task)[2], sample.segments[-1]
        words = next(s for s in sample.segments if isinstance(s, Text))
        assert CODECS.text.decode(words.ids) == item.text
        assert words.predicted == (task in ("lm", "i2t", "v2t", "a2t"))
        assert words.closed == (task != "lm")
        if isinstance(last, Vision):
            assert last.latents.shape == (4 if task == "t2v" else 1, 4, 4, 6)
            assert last.given == (2 if task == "t2v" else 0)
        if isinstance(sample.segments[0], Look):
            assert sample.segments[0].cnn.shape == (4 if task == "v2t" else 1, 8, 8, 8)
            assert np.array_equal(sample.segments[0].pixels, item.frames)
        if isinstance(last, Audio):
            assert last.codes.shape == (4, 4)
            assert last.predicted


def test_given_frames_may_be_chosen() -> None:
    sample = samples_of(CODECS, list(DATA.train("t2v")[:1]), given=1)[0]
    assert isinstance(sample.segments[1], Vision)
    assert sample.segments[1].given == 1


def test_what_goes_in_comes_out(corpus: Corpus) -> None:
    assert corpus.tasks == DATA.tasks
    assert [corpus.size(task) for task in DATA.tasks] == [70, 35, 33, 30, 30, 40, 40]
    for task in DATA.tasks:
        expected = samples_of(CODECS, list(DATA.train(task)[: corpus.size(task)]))
        assert all(same(corpus.get(task, i), sample) for i, sample in enumerate(expected))
    with pytest.raises(IndexError):
        corpus.get("t2i", 35)
    with pytest.raises(IndexError):
        corpus.get("t2x", 0)


def test_a_corpus_is_the_same_bits_again(corpus: Corpus, tmp_path: Path) -> None:
    assert made(Storage(tmp_path)).digests == corpus.digests


def test_a_small_cache_reads_the_same(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps a window of each task, whatever that weighs, and no more."""
    monkeypatch.setattr(module, "WINDOW", 1)
    small, most = Corpus.open(corpus.storage, cache=1), 0
    for i in (34, 0, 20, 34, 1):
        for task in small.tasks:
            at = i % small.size(task)
            assert same(small.get(task, at), corpus.get(task, at), half=False)
            assert len(small._cache) <= len(small.tasks)
            most = max(most, len(small._cache))
    assert most == len(small.tasks)


def test_nothing_is_a_corpus_before_it_is_committed(tmp_path: Path) -> None:
    storage, wanted = Storage(tmp_path), plan(CODECS, DATA, LIMITS, SIZE)
    with pytest.raises(UserError, match=r"no corpus/corpus\.json"):
        Corpus.open(storage)
    with pytest.raises(ValueError, match="missing"):
        Corpus.commit(storage, wanted, {}, SIZE)


def test_after_a_kill_whole_shards_of_the_plan_are_kept(tmp_path: Path) -> None:
    storage, wanted = Storage(tmp_path), plan(CODECS, DATA, LIMITS, SIZE)
    first, second, third = wanted.shards[:3]
    digest = make_shard(storage, CODECS, DATA.train("lm"), first, wanted.fingerprint)
    make_shard(storage, CODECS, DATA.train("lm"), second, "another")
    make_shard(storage, CODECS, DATA.train("lm"), third, wanted.fingerprint)
    whole = storage.read_bytes(third.file)
    storage.write_bytes(third.file, whole[: len(whole) // 2])
    assert kept(storage, wanted) == {first.file: digest}


def test_a_finished_corpus_is_kept_by_its_description(corpus: Corpus) -> None:
    assert kept(corpus.storage, plan(CODECS, DATA, LIMITS, SIZE)) == corpus.digests
    assert kept(corpus.storage, plan(codecs(seed=1), DATA, LIMITS, SIZE)) == {}


def test_other_tokenizers_or_data_are_another_plan() -> None:
    base = plan(CODECS, DATA, LIMITS, SIZE).fingerprint
    assert base == plan(CODECS, DATA, LIMITS, SIZE).fingerprint
    other = load_multimodal(seed=1, form=DATA.form)
    assert (
        len({base, plan(CODECS, other, LIMITS, SIZE).fingerprint, plan(CODECS, DATA, {"lm": 3}, SIZE).fingerprint}) == 3
    )
    assert fingerprint(codecs(seed=1)) != fingerprint(CODECS)


def test_a_damaged_shard_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    for name in corpus.storage.files(FOLDER):
        storage.write_bytes(name, corpus.storage.read_bytes(name))
    file = f"{FOLDER}/t2i-00001.safetensors"
    raw = bytearray(storage.read_bytes(file))
    raw[-1] ^= 1
    storage.write_bytes(file, bytes(raw))
    again = Corpus.open(storage)
    assert again.get("t2i", 0)
    with pytest.raises(CheckpointError, match="changed"):
        again.get("t2i", 20)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b"\xff", b"null", b'{"format": 1}', b'{"format": 1, "fingerprint": "", "size": "x"}']
)
def test_a_damaged_description_is_refused(tmp_path: Path, content: bytes) -> None:
    Storage(tmp_path).write_bytes(f"{FOLDER}/corpus.json", content)
    with pytest.raises(UserError, match="damaged"):
        Corpus.open(Storage(tmp_path))


def test_another_version_is_refused(tmp_path: Path) -> None:
    Storage(tmp_path).write_bytes(f"{FOLDER}/corpus.json", json.dumps({"format": 99}).encode())
    with pytest.raises(UserError, match="format 99"):
        Corpus.open(Storage(tmp_path))


def test_a_state_file_that_is_no_shard_is_refused(tmp_path: Path) -> None:
    from raysys.runtime.checkpoint import write_state

    write_state(
        Storage(tmp_path),
        "x.safetensors",
        {"a": np.zeros(2)},
        {"segments": [{"kind": "Text"}], "task": "lm", "count": 1},
    )
    with pytest.raises(CheckpointError, match="no shard"):
        read_shard(Storage(tmp_path), "x.safetensors")


def test_mixed_items_are_refused(tmp_path: Path) -> None:
    mixed = [DATA.train("t2i")[0], DATA.train("i2t")[0]]
    with pytest.raises(ValueError, match="one task"):
        samples_of(CODECS, mixed)
    with pytest.raises(ValueError, match="needs wave"):
        samples_of(CODECS, [SimpleNamespace(task="t2a", text="x", wave=None)])  # type: ignore[list-item]
    shard = plan(CODECS, DATA, LIMITS, SIZE).shards[0]
    with pytest.raises(ValueError, match="one task and form"):
        write_shard(Storage(tmp_path), shard, samples_of(CODECS, [DATA.train("lm")[0]]), "x")
    assert samples_of(CODECS, []) == []
