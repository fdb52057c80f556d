"""What the commands of the ERNIE job share: data, tokenizers, tokenised samples, and the backbone trained on them.

Notable choices
- Each is a stage of the run: done once, gone on with after a kill, and the same whatever the number of workers.
- With `execution inprocess` everything happens in this process, with the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import ray
import torch

from jobs.ernie_config import ErnieConfig
from jobs.ernie_data import tokenize, tokenize_here
from raysys.data.multimodal import Lazy, Multimodal
from raysys.runtime.progress import Progress
from raysys.runtime.run import Run
from raysys.runtime.session import Session
from raysys.runtime.storage import Storage
from raysys.runtime.train import TrainConfig as Spread
from raysys.runtime.train import fit, fit_here
from raysys.systems.ernie.artifact import FOLDER, Bundle, Tokenizers, load_tokenizers, save
from raysys.systems.ernie.corpus import Corpus
from raysys.systems.ernie.learner import Pretraining
from raysys.systems.ernie.model import UniModel
from raysys.systems.ernie.samples import samples_of
from raysys.systems.ernie.setting import ModelSetting, PretrainSetting, Sizes
from raysys.systems.ernie.tasks import Tested
from raysys.systems.ernie.tokenizers.audio import AudioCodec, AudioSetting
from raysys.systems.ernie.tokenizers.audio_training import AudioLearner
from raysys.systems.ernie.tokenizers.bits import MultiScaleBits
from raysys.systems.ernie.tokenizers.text import TextTokenizer
from raysys.systems.ernie.tokenizers.visual import VisualSetting, VisualTokenizer
from raysys.systems.ernie.tokenizers.visual_training import VisualLearner

State = dict[str, torch.Tensor]
MOST, MOST_BYTES = 4096, 1 << 30
"""Training images, videos or waves that a tokenizer is shown, and the memory that they may take."""


Trained = Callable[[str, Callable[[str], Any]], State]


def trainer(
    config: ErnieConfig, run: Run, session: Session, progress: Progress | None, spread: Spread | None = None
) -> Trained:
    """A function that trains a learner in the stage of that name."""
    how = spread or config.train

    def trained(name: str, make: Callable[[str], Any]) -> State:
        if config.execution == "actors":
            return fit(run.stage(name), session, make, how, progress=progress)
        return fit_here(run.stage(name), make, how, progress=progress)

    return trained


def alone(spread: Spread, blocks: int | None = None) -> Spread:
    """How what has no experts to share out is trained: without DeepSpeed, by workers that divide its blocks, or by one."""
    workers = 1 if blocks is None else math.gcd(spread.workers, blocks)
    return spread.with_values({"workers": workers, "deepspeed": "off", "expert_parallel": 1})


def get_tokenizers(config: ErnieConfig, run: Run, session: Session, data: Multimodal) -> Tokenizers:
    """Those of another run, or trained here; they are saved in this run."""
    if run.storage.exists(f"{FOLDER}/ernie.json"):
        return load_tokenizers(run.path)  # of an earlier process; what was saved with a model stays as it is
    if config.tokenizers:
        found = load_tokenizers(config.tokenizers)
        if found.form != config.form:
            raise ValueError(f"tokenizers: got {config.tokenizers}, which is of another form than this run")
        save(run.storage, found)
        return found
    with Progress(
        config.visual.image_steps + config.visual.video_steps + config.audio.steps, "tokenizers", unit="steps"
    ) as progress:
        blocks = math.gcd(config.visual.blocks, config.audio.blocks)
        trained = trainer(config, run, session, progress, alone(config.train, blocks))
        text = TextTokenizer.train(words(data, config.text.characters), config.text.size)
        images, videos = stacked(data, "t2i", "frames"), stacked(data, "t2v", "frames")
        waves, form = stacked(data, "t2a", "wave"), config.form
        visual = VisualTokenizer(config.visual, form.channels, form.height, form.width)
        if images is not None or videos is not None:
            given = shared(config, images), shared(config, videos)
            visual.load_state_dict(trained("visual", partial(make_visual, config.visual, *given, config.seed)))
        audio = AudioCodec(config.audio)
        if waves is not None:
            sounds = shared(config, waves)
            audio.load_state_dict(trained("audio", partial(make_audio, config.audio, sounds, config.seed)))
    found = Tokenizers(form, text, visual.eval(), audio.eval(), config.data, data.licence, data.tasks)
    save(run.storage, found)
    return found


def shared(config: ErnieConfig, value: Any) -> Any:
    """A reference that workers read, where there are workers."""
    return ray.put(value) if config.execution == "actors" and value is not None else value


def fetched(value: Any) -> Any:
    """What a reference refers to; anything else is itself."""
    return ray.get(value) if isinstance(value, ray.ObjectRef) else value


def words(data: Multimodal, most: int) -> list[str]:
    """Training captions and texts, up to `most` characters."""
    tasks = [task for task in ("i2t", "v2t", "a2t", "lm") if task in data.tasks]
    found, left = list[str](), most
    for text in (item.text for task in tasks for item in data.train(task)[:MOST]):
        if left <= 0:
            break
        found.append(text[:left])
        left -= len(text)
    return found


def stacked(data: Multimodal, task: str, field: str) -> torch.Tensor | None:
    """Training frames (N, T, C, H, W) or waves (N, n) of a task, the first ones; None if the data has none."""
    if task not in data.tasks:
        return None
    items = data.train(task)
    count = min(MOST, len(items), max(1, MOST_BYTES // getattr(items[0], field).nbytes))
    return torch.from_numpy(np.stack([getattr(item, field) for item in items[:count]]))


def make_visual(setting: VisualSetting, images: Any, videos: Any, seed: int, device: str) -> VisualLearner:
    """The learner of the visual tokenizer, in whatever process it is trained."""
    first, clips = fetched(images), fetched(videos)
    if first is None:
        return VisualLearner(setting, clips[:, 0], clips, seed, device)
    return VisualLearner(setting, first[:, 0], clips, seed, device)


def make_audio(setting: AudioSetting, waves: Any, seed: int, device: str) -> AudioLearner:
    """The learner of the audio codec."""
    return AudioLearner(setting, fetched(waves), seed, device)


def make_pretraining(
    model: ModelSetting, setting: PretrainSetting, sizes: Sizes, quantiser: Any, corpus: str, seed: int, device: str
) -> Pretraining:
    """The learner of the backbone; it reads the corpus itself."""
    bits = MultiScaleBits(sizes.scales, sizes.bits)
    bits.load_state_dict(fetched(quantiser))
    return Pretraining(model, setting, sizes, bits, Corpus.open(Storage(corpus)), seed, device)


def get_corpus(config: ErnieConfig, run: Run, session: Session, tokenizers: Tokenizers, data: Multimodal) -> Corpus:
    """Training samples, tokenised into shards of this run."""
    limits = dict.fromkeys(data.tasks, config.items) if config.items else None
    if config.execution == "actors":
        return tokenize(config, run, session, tokenizers, data, limits)
    return tokenize_here(config, run, tokenizers, data, limits)


def half(data: Multimodal, task: str, tuning: bool = False) -> Lazy:
    """Held-out items of a task at even places, or at odd ones where there are several."""
    items = data.test(task)
    return items[int(tuning and len(items) > 1) :: 2]


def held_out(data: Multimodal, tokenizers: Tokenizers, count: int, tuning: bool = False) -> dict[str, Tested]:
    """Up to `count` held-out items of each task (of every n-th where there are more, so that all kinds are met): of those at even
    places, which are for reports, or at odd ones, which are for choosing constants. A digit or a picture may be behind items of
    both, in another place or with another caption; none is behind an item of training."""
    found = {}
    for task in data.tasks:
        items = half(data, task, tuning)
        chosen = items[:: max(1, len(items) // count)][:count]
        found[task] = Tested(list(chosen), samples_of(tokenizers, chosen))
    return found


def trained_model(model: ModelSetting, sizes: Sizes, state: State) -> UniModel:
    """The model of a finished pre-training."""
    found = UniModel(model, sizes)
    found.load_state_dict({n.removeprefix("model."): v for n, v in state.items() if n.startswith("model.")})
    return found.eval().requires_grad_(False)


def pretrain_model(
    config: ErnieConfig, run: Run, session: Session, tokenizers: Tokenizers, seed: int, progress: Progress | None
) -> Bundle:
    """The backbone, trained on the run's corpus or read from its last checkpoint."""
    sizes, quantiser = tokenizers.sizes, tokenizers.visual.quantiser.state_dict()
    make = partial(make_pretraining, config.model, config.pretrain, sizes, quantiser, run.path, seed)
    state = trainer(config, run, session, progress)(f"seed{seed}/backbone", make)
    return Bundle.of(tokenizers, trained_model(config.model, sizes, state), config.pretrain.samples)


def train_beside(model: ModelSetting, pretrain: PretrainSetting, run: str, seed: int, spread: Spread) -> Bundle:
    """Another backbone on a run's tokenizers and corpus, trained in this process and kept by nobody but the caller."""
    tokenizers = load_tokenizers(run)
    sizes, quantiser = tokenizers.sizes, tokenizers.visual.quantiser.state_dict()
    make = partial(make_pretraining, model, pretrain, sizes, quantiser, run, seed)
    return Bundle.of(tokenizers, trained_model(model, sizes, fit_here(None, make, alone(spread))), pretrain.samples)
