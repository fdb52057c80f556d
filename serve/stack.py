"""One frozen text model and the LoRA adapters of a run: many adapters in one forward pass. No Ray here.

The folder `<run>/adapters`, at any path or URI that pyarrow.fs opens:

    classifier.json        {"format": 1, "model": ..., "labels": [...], "max_length": ..., "pair": ...,
                           "precision": "float32" (if missing) or "bfloat16"}
    head.safetensors       tensor `head` (C, d), float32: the classes' logits are head @ pooled text
    <name>/                one peft adapter: adapter_config.json, adapter_model.safetensors

All adapters of a run adapt the same layers with the same rank and alpha, so that their factors can be stacked.

Shapes: k texts of a batch, each with its own adapter; d hidden size, C classes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

import safetensors.torch
import torch
from pydantic import BaseModel, Field, ValidationError
from safetensors import SafetensorError
from torch import Tensor

from raysys.nn.body import TextBody
from raysys.nn.encoder import PASS_TOKENS, chunks
from raysys.nn.lora import CONFIG, WEIGHTS, Layout, import_adapter, linear_shapes
from raysys.nn.pretrained import load_base
from raysys.runtime.sentences import UserError, closest, explain
from raysys.runtime.storage import Storage
from serve.refusal import Refused

FOLDER, DESCRIPTION, HEAD = "adapters", "classifier.json", "head.safetensors"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class Classifier(BaseModel):
    """What classifier.json says."""

    format: Literal[1]
    model: str = Field(min_length=1)
    labels: list[Annotated[str, Field(min_length=1)]] = Field(min_length=2)
    max_length: int = Field(ge=1)
    pair: bool
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the frozen layers' products, as in training."""


class Artifact:
    """The folder of a run's adapters."""

    def __init__(self, run: str) -> None:
        self.storage = Storage(run).join(FOLDER)

    def classifier(self) -> Classifier:
        """What the adapters classify.

        Raises:
            UserError: there is no such file, or it is not what it should be.
        """
        where = self.storage.address(DESCRIPTION)
        try:
            return Classifier.model_validate(json.loads(self.storage.read_bytes(DESCRIPTION)))
        except ValidationError as error:
            raise UserError(f"{where}: {explain(error, Classifier)}") from error
        except FileNotFoundError as error:
            raise UserError(f"run: got {self.storage.uri.rpartition('/')[0]}; there is no {where}") from error
        except (OSError, ValueError) as error:
            raise UserError(f"run: {where} cannot be read ({str(error).splitlines()[0]})") from error

    def names(self) -> list[str]:
        """Names of the adapters that are there, whole or not."""
        return [name for name in self.storage.folders() if NAME.fullmatch(name)]

    def has(self, name: str) -> bool:
        """Whether there is anything of an adapter of that name."""
        return bool(NAME.fullmatch(name)) and any(self.storage.exists(f"{name}/{file}") for file in (CONFIG, WEIGHTS))

    def head(self, classes: int, width: int) -> Tensor:
        """(C, d) float32.

        Raises:
            ValueError: it cannot be read, or has another shape.
        """
        where = self.storage.address(HEAD)
        try:
            head = safetensors.torch.load(self.storage.read_bytes(HEAD))["head"].float()
        except (OSError, KeyError, SafetensorError) as error:
            raise ValueError(f"{where}: is no whole head ({type(error).__name__}: {error})") from error
        if head.shape != (classes, width) or not head.isfinite().all():
            raise ValueError(
                f"{where}: got a head {tuple(head.shape)}; expected finite numbers {(classes, width)}, classes by hidden size"
            )
        return head


class Factors(NamedTuple):
    """An adapter in memory: a (size_a,), b (size_b,)."""

    a: Tensor
    b: Tensor


class Item(NamedTuple):
    """A text (or pair of texts) to classify with an adapter."""

    text: str
    second: str | None
    factors: Factors


class Stack:
    """The base model with room for a batch of adapters. Not thread-safe: `probabilities` is for one thread.

    Args:
        run: folder (path or URI) of the run.
        model: loaded instead of the one that classifier.json names, if given; it must have the same layers.

    Raises:
        ValueError, UserError: the artifact is not whole, the model is not there or takes fewer tokens, or no adapter can
            be read.
    """

    def __init__(self, run: str, model: str | None = None, device: str = "cpu") -> None:
        self.artifact = Artifact(run)
        self.classifier = self.artifact.classifier()
        self.base = load_base(model or self.classifier.model, device)
        self.device = device
        self.shapes = linear_shapes(self.base.model)
        self.reference, layout = self._first_layout()
        self.body = TextBody(
            self.base, layout, self.classifier.max_length, bf16=self.classifier.precision == "bfloat16"
        )
        self.head = self.artifact.head(len(self.classifier.labels), self.base.width).to(device)

    def _first_layout(self) -> tuple[str, Layout]:
        """The first adapter (by name) that can be read: all others must be laid out like it."""
        wrong = "there is none"
        for name in self.artifact.names():
            try:
                return name, import_adapter(self.artifact.storage, name, self.shapes)[0]
            except ValueError as error:
                wrong = str(error)
        raise UserError(f"run: {self.artifact.storage.uri} holds no adapter that can be read ({wrong})")

    def read(self, name: str) -> Factors:
        """Load one adapter; it may take as long as the storage does, and is safe in any thread.

        Raises:
            Refused: 404 where there is none of that name, 500 where it is damaged or laid out differently.
        """
        if not self.artifact.has(name):
            hint = closest(name, self.artifact.names())
            raise Refused(
                404, f"adapter: got {name!r}; this run has none of that name{hint or ', GET /adapters lists all'}"
            )
        try:
            layout, a, b = import_adapter(self.artifact.storage, name, self.shapes)
        except ValueError as error:
            raise Refused(500, str(error)) from error
        ours = self.body.layout
        if layout != ours:
            raise Refused(
                500,
                f"adapter {name}: has rank {layout.rank} and alpha {layout.alpha:g} on {len(layout.modules)} layers; expected"
                f" the same layers, rank and alpha as {self.reference} ({ours.rank}, {ours.alpha:g}, {len(ours.modules)})",
            )
        return Factors(a.to(self.device), b.to(self.device))

    def probabilities(self, items: Sequence[Item]) -> list[list[float]]:
        """(k, C): each text under its own adapter; one forward pass, or a few where lengths differ much."""
        second: list[Any] | None = [item.second for item in items] if self.classifier.pair else None
        with torch.inference_mode():
            made = self.body.tokens([item.text for item in items], second)
            a = torch.stack([item.factors.a for item in items])
            b = torch.stack([item.factors.b for item in items])
            lengths = made["attention_mask"].sum(1).tolist()
            out = torch.empty(len(items), len(self.classifier.labels), dtype=torch.float64)
            for rows in chunks(lengths, PASS_TOKENS[self.device]):
                part = {key: value[rows, : lengths[rows[-1]]] for key, value in made.items()}
                pooled = self.body.pooled_tokens(part, a[rows], b[rows])
                out[rows] = (pooled @ self.head.T).double().softmax(-1).cpu()
            return out.tolist()
