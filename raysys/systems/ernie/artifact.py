"""What a run leaves for others: tokenizers and model, as safetensors and JSON.

ernie/ernie.json             format, settings, sizes, what it was trained on, SHA-256 of every file
ernie/text.json              the text tokenizer
ernie/visual.safetensors     the visual tokenizer
ernie/audio.safetensors      the audio codec
ernie/model.safetensors      the backbone; missing while only tokenizers were trained

Notable choices
- Nothing is unpickled; a file is believed only if its hash is the description's.
- A sub-model is written in the same format (`save` of a bundle whose model was cut out), so whatever reads one reads the other.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import Tensor, nn

from raysys.runtime.config import Config
from raysys.runtime.sentences import UserError
from raysys.runtime.storage import Storage
from raysys.systems.ernie.model import UniModel
from raysys.systems.ernie.setting import Counts, FormSetting, ModelSetting, Sizes
from raysys.systems.ernie.tokenizers.audio import AudioCodec, AudioSetting
from raysys.systems.ernie.tokenizers.text import TextTokenizer
from raysys.systems.ernie.tokenizers.visual import VisualSetting, VisualTokenizer

FOLDER = "ernie"
FORMAT = 1


class Description(Config):
    """What ernie.json says."""

    format: int
    form: FormSetting
    visual: VisualSetting
    audio: AudioSetting
    model: ModelSetting | None
    multi_token: bool = False
    """Whether the model's file has the module of multi-token prediction (a sub-model that was cut out has none)."""
    data: str
    licence: str
    tasks: tuple[str, ...]
    """What the data has examples of; without any of its kind a tokenizer is untrained."""
    samples: Counts = Counts()
    """How many of each task the model saw in a step, which is what its routing was balanced for."""
    files: dict[str, str]
    """SHA-256 of each file."""


@dataclass(frozen=True)
class Tokenizers:
    """Trained tokenizers, for data of one form."""

    form: FormSetting
    text: TextTokenizer
    visual: VisualTokenizer
    audio: AudioCodec
    data: str
    licence: str
    tasks: tuple[str, ...]
    """What the data has examples of, of `stream.TASKS`."""

    @property
    def sizes(self) -> Sizes:
        """What they fix of a model."""
        v, a = self.visual, self.audio
        return Sizes(
            self.text.size, v.setting.bits, v.quantiser.scales, a.setting.codes, a.setting.levels, v.feature_width,
            self.form.channels,
        )  # fmt: skip


@dataclass(frozen=True)
class Bundle(Tokenizers):
    """Tokenizers with a model."""

    model: UniModel
    samples: Counts = field(default_factory=Counts)
    """How many of each task the model saw in a step."""

    @classmethod
    def of(cls, tokenizers: Tokenizers, model: UniModel, samples: Counts | None = None) -> Bundle:
        t = tokenizers
        return cls(t.form, t.text, t.visual, t.audio, t.data, t.licence, t.tasks, model, samples or Counts())

    @torch.no_grad()
    def hear(self, codes: NDArray[np.int64]) -> NDArray[np.float32]:
        """The wave (n,) of codes (frames, Q)."""
        if not len(codes):
            return np.zeros(0, np.float32)
        wave: NDArray[np.float32] = self.audio.decode(torch.from_numpy(codes)[None])[0].numpy()
        return wave

    def with_model(self, model: UniModel) -> Bundle:
        return replace(self, model=model)


def save(storage: Storage, bundle: Tokenizers) -> None:
    """Write tokenizers and, of a Bundle, the model; the description comes last, so an artifact is whole or not there."""
    files = {
        "text.json": bundle.text.to_bytes(),
        "visual.safetensors": _packed(bundle.visual),
        "audio.safetensors": _packed(bundle.audio),
    }
    model = bundle.model if isinstance(bundle, Bundle) else None
    if model is not None:
        files["model.safetensors"] = _packed(model)
    for name, content in files.items():
        storage.write_bytes(f"{FOLDER}/{name}", content)
    told = Description(
        format=FORMAT, form=bundle.form, visual=bundle.visual.setting, audio=bundle.audio.setting,
        model=None if model is None else model.setting, multi_token=model is not None and model.mtp is not None,
        data=bundle.data, licence=bundle.licence, tasks=bundle.tasks,
        samples=bundle.samples if isinstance(bundle, Bundle) else Counts(),
        files={name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
    )  # fmt: skip
    storage.write_bytes(f"{FOLDER}/ernie.json", told.model_dump_json(indent=1).encode())


def describe(run: str) -> Description:
    """The description of a run's artifact.

    Raises:
        UserError: there is none, or it is damaged.
    """
    storage = Storage(run)
    try:
        told = Description.model_validate_json(storage.read_bytes(f"{FOLDER}/ernie.json"))
    except FileNotFoundError as error:
        raise UserError(f"run: got {run}; expected a run folder that holds {FOLDER}/ernie.json") from error
    except (ValidationError, json.JSONDecodeError, UnicodeDecodeError, ValueError) as error:
        raise UserError(f"run: got {run}, whose {FOLDER}/ernie.json is damaged or of another version") from error
    if told.format != FORMAT:
        raise UserError(f"run: got an artifact of format {told.format}; this version reads format {FORMAT}")
    return told


def load_tokenizers(run: str) -> Tokenizers:
    """The tokenizers of a run's artifact, ready for use.

    Raises:
        UserError: it is missing or damaged.
    """
    told, storage = describe(run), Storage(run)
    text = TextTokenizer.from_bytes(_read(storage, told, "text.json"))
    visual = VisualTokenizer(told.visual, told.form.channels, told.form.height, told.form.width)
    audio = AudioCodec(told.audio)
    for module, name in ((visual, "visual.safetensors"), (audio, "audio.safetensors")):
        _fill(module, _read(storage, told, name), name)
    return Tokenizers(told.form, text, visual.eval(), audio.eval(), told.data, told.licence, told.tasks)


def load(run: str, device: str = "cpu") -> Bundle:
    """A run's artifact, ready for use; model on `device`, tokenizers on the CPU.

    Raises:
        UserError: it is missing or damaged, or holds tokenizers only.
    """
    told = describe(run)
    if told.model is None:
        raise UserError(f"run: got {run}, which holds tokenizers but no model; expected a run of pretrain")
    tokenizers = load_tokenizers(run)
    data = _read(Storage(run), told, "model.safetensors")
    m = told.model
    layer = 3 * (m.experts * m.expert_width + m.shared_width) + 4 * m.width
    least = 2 * m.width * (m.layers * layer + tokenizers.sizes.vocabulary)
    if least > len(data):  # checked first: a description can ask for more than memory holds
        raise UserError(f"run: {FOLDER}/model.safetensors of {run} does not fit its ernie.json: got {len(data)} bytes")
    model = UniModel(m, tokenizers.sizes)
    if not told.multi_token:
        model.mtp = None
    _fill(model, data, "model.safetensors")
    return Bundle.of(tokenizers, model.to(device).eval().requires_grad_(False), told.samples)


def _packed(module: nn.Module) -> bytes:
    return safetensors.torch.save(
        {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}
    )


def _read(storage: Storage, told: Description, name: str) -> bytes:
    try:
        data = storage.read_bytes(f"{FOLDER}/{name}")
    except FileNotFoundError as error:
        raise UserError(f"run: {storage.uri} has no {FOLDER}/{name}, which its ernie.json names") from error
    if hashlib.sha256(data).hexdigest() != told.files.get(name):
        raise UserError(f"run: {FOLDER}/{name} of {storage.uri} has changed since it was written")
    return data


def _fill(module: nn.Module, data: bytes, name: str) -> None:
    try:
        state: dict[str, Tensor] = safetensors.torch.load(data)
        module.load_state_dict(state)
    except (SafetensorError, RuntimeError) as error:
        raise UserError(f"run: {FOLDER}/{name} does not fit its ernie.json: {_first(error)}") from error


def _first(error: Any) -> str:
    return str(error).splitlines()[0]
