"""The Ray Data pipeline: the bits of a corpus depend neither on the actors nor on a kill in the middle."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from jobs.cli import ClusterJob
from jobs.ernie_data import tokenize, tokenize_here
from raysys.data.multimodal import Form, load_multimodal
from raysys.runtime.session import Session
from raysys.runtime.storage import Storage
from raysys.systems.ernie.artifact import Tokenizers, save
from raysys.systems.ernie.corpus import FOLDER, Corpus
from raysys.systems.ernie.setting import FormSetting
from raysys.systems.ernie.tokenizers.audio import AudioSetting
from raysys.systems.ernie.tokenizers.audio_training import AudioLearner
from raysys.systems.ernie.tokenizers.text import TextTokenizer
from raysys.systems.ernie.tokenizers.visual import VisualSetting
from raysys.systems.ernie.tokenizers.visual_training import VisualLearner

ROOT = Path(__file__).resolve().parents[2]
FORM = FormSetting(tones=300, videos=300, samples=512)
DATA = load_multimodal(form=Form(**FORM.model_dump()))
LIMITS = {"lm": 300, "t2i": 600, "i2t": 600}


def tokenizers() -> Tokenizers:
    images = torch.from_numpy(np.stack([x.frames[0] for x in DATA.train("t2i")[:32]]))
    waves = torch.from_numpy(np.stack([x.wave for x in DATA.train("t2a")[:32]]))
    visual = VisualLearner(VisualSetting(width=8, bits=6), images)
    audio = AudioLearner(AudioSetting(width=16, codes=8), waves)
    visual.before(0)
    audio.before(0)
    text = TextTokenizer.train(["a seven at the top left"], 280)
    return Tokenizers(FORM, text, visual.module.eval(), audio.module.eval(), "embedded", DATA.licence, DATA.tasks)


FOUND = tokenizers()


def run_in(folder: Path) -> Any:
    """What `tokenize` uses of a run."""
    run = SimpleNamespace(storage=Storage(folder))
    save(run.storage, FOUND)
    return run


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Made in this process, undisturbed."""
    return tokenize_here(None, run_in(tmp_path_factory.mktemp("calm")), FOUND, DATA, LIMITS)


def test_a_stopped_corpus_goes_on_where_it_was(calm: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import jobs.ernie_data as job

    made = list[str]()

    def until_the_fifth(storage: Storage, *rest: Any) -> str:
        if len(made) == 4:
            raise KeyboardInterrupt
        made.append(rest[2].file)
        return original(storage, *rest)

    original = job.make_shard
    monkeypatch.setattr(job, "make_shard", until_the_fifth)
    run = run_in(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        tokenize_here(None, run, FOUND, DATA, LIMITS)
    again = list[str]()
    monkeypatch.setattr(job, "make_shard", lambda s, *rest: again.append(rest[2].file) or original(s, *rest))
    assert tokenize_here(None, run, FOUND, DATA, LIMITS).digests == calm.digests
    assert not set(again) & set(made)
    again.clear()
    assert tokenize_here(None, run, FOUND, DATA, LIMITS).digests == calm.digests
    assert not again


def test_actors_make_the_bits_of_this_process(ray_cluster: Any, calm: Corpus, tmp_path: Path) -> None:
    corpus = tokenize(ClusterJob(), run_in(tmp_path), Session(), FOUND, DATA, LIMITS, 1)
    assert corpus.digests == calm.digests
    assert corpus.size("t2i") == 600


SCRIPT = """
import sys
from jobs.cli import ClusterJob
from jobs.ernie_data import tokenize
from raysys.runtime.session import ClusterConfig, Session
from tests_ernie_data import DATA, FOUND, LIMITS, run_in
with Session(ClusterConfig(address=sys.argv[2])) as session:
    tokenize(ClusterJob(), run_in(sys.argv[1]), session, FOUND, DATA, LIMITS, 1)
"""


@pytest.mark.slow
def test_a_killed_pipeline_ends_with_the_bits_of_an_undisturbed_one(
    ray_cluster: Any, calm: Corpus, tmp_path: Path
) -> None:
    """SIGKILL of a pipeline as soon as some shards are there; another, of three actors, goes on and makes none of them again."""
    (tmp_path / "tests_ernie_data.py").write_text(Path(__file__).read_text().replace("parents[2]", "parent"))
    (tmp_path / "go.py").write_text(SCRIPT)
    run = tmp_path / "run"
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}

    command = [sys.executable, str(tmp_path / "go.py"), str(run), ray_cluster.address]
    with (tmp_path / "log.txt").open("w") as log:
        process = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=log, stderr=log, start_new_session=True)
    until = time.monotonic() + 200
    while time.monotonic() < until and len(list((run / FOLDER).glob("*.safetensors"))) < 3:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    there = {p.name: p.stat().st_mtime_ns for p in (run / FOLDER).glob("*.safetensors")}
    assert len(there) >= 3, (tmp_path / "log.txt").read_text()[-3000:]
    assert not (run / FOLDER / "corpus.json").exists()
    again = SimpleNamespace(storage=Storage(run))
    assert tokenize(ClusterJob(), again, Session(), FOUND, DATA, LIMITS, 3).digests == calm.digests
    after = {p.name: p.stat().st_mtime_ns for p in (run / FOLDER).glob("*.safetensors")}
    assert sum(after[name] == when for name, when in there.items()) >= 2
