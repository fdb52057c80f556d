"""What a run leaves for others: the teacher, the predictor on top of it, and how texts become prompts.

retriever/retriever.json           format, settings, fingerprint, what it was trained on
retriever/backbone.safetensors     all weights of the teacher
retriever/predictor.safetensors    the student's predictor
retriever/model/                   language models only: configuration and tokenizer, as transformers writes them

Shapes: n texts, d hidden size.

Notable choices
- Nothing is unpickled and no code that comes with a model is run.
- The description holds the SHA-256 of each file, since a damaged number in a safetensors file looks like any other number.
- The fingerprint covers what document vectors depend on: the teacher's weights, the template, labels, lengths, and the frozen
  encoder. Vectors of equal fingerprint can be compared; training the predictor again changes none.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import nn

from raysys.runtime.config import Config
from raysys.runtime.sentences import UserError
from raysys.runtime.storage import Storage
from raysys.systems.rabtriever import prompt
from raysys.systems.rabtriever.backbone import Backbone, TokenBackbone
from raysys.systems.rabtriever.predictor import Predictor
from raysys.systems.rabtriever.reader import BridgeReader, Reader, TokenReader, make_backbone, make_reader, prompt_of
from raysys.systems.rabtriever.setting import StudentSetting, TeacherSetting
from raysys.systems.rabtriever.teacher import Reranker, digest

FOLDER = "retriever"
FORMAT = 1
F32 = NDArray[np.float32]


class Description(Config):
    """What retriever.json says."""

    format: int
    teacher: TeacherSetting
    student: StudentSetting
    fingerprint: str
    predictor: str
    """SHA-256 of predictor.safetensors."""
    data: str
    licence: str
    width: int


def fingerprint(setting: TeacherSetting, backbone: Backbone, reader: Reader) -> str:
    """Hash of all that document vectors depend on."""
    told = {
        "template": [prompt.DOCUMENT, prompt.QUERY, prompt.QUESTION],
        "labels": list(backbone.labels),
        "lengths": [setting.max_document, setting.max_query],
        "units": [setting.units, setting.chunks] if setting.model == "bridge" else "ids",
        "weights": digest(backbone),
        "encoder": hash_of(reader.encoders["document"].base.model) if isinstance(reader, BridgeReader) else "",
        "vocabulary": sorted(tokenizer_of(reader).get_vocab().items()),
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def tokenizer_of(reader: Reader) -> Any:
    """What cuts the reader's texts into tokens."""
    if isinstance(reader, BridgeReader):
        return reader.tokenizer
    assert isinstance(reader, TokenReader)
    return reader.prompt.tokenizer


def hash_of(model: nn.Module) -> str:
    """SHA-256 of a frozen encoder's weights."""
    told = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        told.update(name.encode())
        told.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return told.hexdigest()


def save_teacher(storage: Storage, setting: TeacherSetting, backbone: Backbone, reader: Reader) -> None:
    """Write the teacher alone: what teacher actors and the index of documents need.

    Raises:
        ValueError: it still has LoRA factors (`reader.merged` adds them into the weights).
    """
    if factors := [name for name in backbone.state_dict() if ".lora_" in name]:
        raise ValueError(f"backbone: got {len(factors)} LoRA factors; merge them before it is saved")
    files = {"backbone.safetensors": _packed(backbone)}
    if isinstance(reader, TokenReader):
        with tempfile.TemporaryDirectory() as folder:
            body: Any = backbone.body
            body.config.save_pretrained(folder)
            reader.prompt.tokenizer.save_pretrained(folder)
            files |= {f"model/{file.name}": file.read_bytes() for file in sorted(Path(folder).iterdir())}
    for name, content in files.items():
        storage.write_bytes(f"{FOLDER}/{name}", content)
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    told = {"format": FORMAT, "files": digests, **setting.model_dump()}
    storage.write_bytes(f"{FOLDER}/teacher.json", json.dumps(told, indent=1).encode())


def save_student(
    storage: Storage,
    teacher: TeacherSetting,
    student: StudentSetting,
    predictor: Predictor,
    mark: str,
    data: str,
    licence: str,
) -> None:
    """Write the predictor, and last the description that makes the folder an artifact."""
    content = _packed(predictor)
    storage.write_bytes(f"{FOLDER}/predictor.safetensors", content)
    told = Description(
        format=FORMAT,
        teacher=teacher,
        student=student,
        fingerprint=mark,
        predictor=hashlib.sha256(content).hexdigest(),
        data=data,
        licence=licence,
        width=predictor.width,
    )
    storage.write_bytes(f"{FOLDER}/retriever.json", told.model_dump_json(indent=1).encode())


def load_teacher(storage: Storage, device: str = "cpu") -> tuple[TeacherSetting, Backbone, Reader]:
    """The frozen teacher of a run folder.

    Raises:
        UserError: a file is missing, damaged or not ours.
    """
    told = _json(storage, "teacher.json")
    files = told.pop("files", None)
    if told.pop("format", None) != FORMAT or not isinstance(files, dict) or "backbone.safetensors" not in files:
        raise UserError(f"run: {storage.address(FOLDER)}/teacher.json is not of format {FORMAT}")
    setting = TeacherSetting.of(told, source=f"{storage.address(FOLDER)}/teacher.json")
    if setting.model == "bridge":
        try:
            reader = make_reader(setting, device)
        except ValueError as error:
            raise UserError(f"run: got {storage.uri}; its frozen encoder is not here ({error})") from error
        backbone = make_backbone(setting, reader, 0, device)
    else:
        backbone, reader = _language_model(storage, setting, device, files)
    _load(backbone, storage, "backbone.safetensors", str(files["backbone.safetensors"]))
    return setting, backbone.eval().requires_grad_(False), reader


def _language_model(
    storage: Storage, setting: TeacherSetting, device: str, files: dict[str, Any]
) -> tuple[Backbone, Reader]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        for name, sha256 in files.items():  # those that were written, and no others
            if name.startswith("model/"):
                (Path(folder) / name.rpartition("/")[2]).write_bytes(_whole(storage, name, str(sha256)))
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # of what another version wrote; the tokenizers library raises a bare Exception
            raise UserError(f"run: {storage.address(FOLDER)}/model cannot be read ({str(error)[:200]})") from error
    reader = TokenReader(prompt_of(tokenizer, setting))
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, dtype=torch.float32)
    return TokenBackbone(model, reader.prompt.label_ids, setting.max_document).to(device), reader


class Retriever:
    """Queries and documents to vectors whose inner product, plus a number of the query, is the student's log-odds.

    Args: see `load`.
    """

    def __init__(self, told: Description, backbone: Backbone, reader: Reader, predictor: Predictor, name: str) -> None:
        self.told, self.reader, self.predictor, self.name = told, reader, predictor.eval().requires_grad_(False), name
        self.teacher = Reranker(backbone)
        self.width, self.fingerprint = told.width, told.fingerprint
        self.direction = backbone.direction

    @classmethod
    def load(cls, run: str, device: str = "cpu") -> Retriever:
        """The artifact in the folder (path or URI) of a run.

        Raises:
            UserError: there is none, a file is damaged, or its weights are not those that the description names.
        """
        storage = Storage(run)
        told = Description.of(_json(storage, "retriever.json"), source=f"{storage.address(FOLDER)}/retriever.json")
        if told.format != FORMAT:
            raise UserError(f"run: got {run}; its retriever has format {told.format}, this version reads {FORMAT}")
        _, backbone, reader = load_teacher(storage, device)
        found = fingerprint(told.teacher, backbone, reader)
        if found != told.fingerprint:
            raise UserError(
                f"run: got {run}; its teacher or encoder is not the one that the predictor was trained with"
            )
        s = told.student
        predictor = Predictor(told.width, s.combine, s.additive, s.layers, s.hidden).to(device)
        _load(predictor, storage, "predictor.safetensors", told.predictor)
        return cls(told, backbone, reader, predictor, storage.uri.rpartition("/")[2])

    def queries(self, texts: Sequence[str]) -> tuple[F32, F32]:
        """u (n, d) and c (n,): the log-odds of a document with vector z are <u, z> + c.

        Raises:
            ValueError: a text is empty, or there is none.
        """
        states = self.teacher.queries(self.reader.queries(texts))
        with torch.inference_mode():
            u, c = self.predictor.fold(states.to(self.direction.device), self.direction)
        return u.float().cpu().numpy(), c.float().cpu().numpy()

    def documents(self, texts: Sequence[str]) -> F32:
        """z (n, d): the teacher's state after each document, as an index stores it.

        Raises:
            ValueError: a text is empty, or there is none.
        """
        return self.teacher.documents(self.reader.documents(texts)).numpy()

    def rerank(self, query: str, documents: Sequence[str]) -> F32:
        """The teacher's log-odds (n,) of documents for a query, each read together with it.

        Raises:
            ValueError: a text is empty, or there is no document.
        """
        part, asked = self.reader.documents(documents), self.reader.queries([query])
        pairs = np.stack([np.zeros(len(documents), np.int64), np.arange(len(documents))], 1)
        return self.teacher.scores(self.teacher.states(part, asked, pairs)).numpy()

    def prompt(self, query: str, document: str) -> str:
        """What the teacher is asked about a query and a document, in words."""
        return prompt.worded(query, document)


def _json(storage: Storage, name: str) -> dict[str, Any]:
    where = storage.address(f"{FOLDER}/{name}")
    try:
        found = json.loads(storage.read_bytes(f"{FOLDER}/{name}"))
    except FileNotFoundError as error:
        raise UserError(
            f"run: got {storage.uri}; there is no {where} (python -m jobs.rabtriever train makes one)"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"run: {where} cannot be read ({str(error).splitlines()[0]})") from error
    if not isinstance(found, dict):
        raise UserError(f"run: {where} holds a JSON {type(found).__name__}, expected an object")
    return found


def _packed(module: nn.Module) -> bytes:
    """All weights and buffers as a safetensors file."""
    weights = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in module.state_dict().items()}
    return safetensors.torch.save(weights)


def _whole(storage: Storage, name: str, sha256: str) -> bytes:
    """The content of a file that must have this SHA-256."""
    where = storage.address(f"{FOLDER}/{name}")
    try:
        content = storage.read_bytes(f"{FOLDER}/{name}")
    except OSError as error:
        raise UserError(f"run: got {storage.uri}; {where} cannot be read ({type(error).__name__})") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(f"run: got {storage.uri}; {where} is damaged, its SHA-256 is not the one that was written down")
    return content


def _load(module: nn.Module, storage: Storage, name: str, sha256: str) -> None:
    content = _whole(storage, name, sha256)
    try:
        module.load_state_dict(safetensors.torch.load(content))
    except (SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"run: {storage.address(f'{FOLDER}/{name}')} holds other weights ({reason})") from error
