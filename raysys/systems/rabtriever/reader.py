"""Texts to the two parts of the prompt, for both kinds of backbone; and the backbone that a setting asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from raysys.nn.encoder import TextEncoder
from raysys.nn.pretrained import find_model, load_base
from raysys.runtime.seeds import Seeds, Stream
from raysys.systems.rabtriever.backbone import Backbone, BridgeBackbone, Part, TokenBackbone, stack_parts
from raysys.systems.rabtriever.prompt import PromptTokens, plain
from raysys.systems.rabtriever.setting import TeacherSetting


class Reader(Protocol):
    """Texts to parts of prompts."""

    def documents(self, texts: Sequence[str]) -> Part: ...

    def queries(self, texts: Sequence[str]) -> Part: ...


class TokenReader:
    """Units are token ids of the template."""

    def __init__(self, prompt: PromptTokens) -> None:
        self.prompt = prompt

    def documents(self, texts: Sequence[str]) -> Part:
        return stack_parts([torch.tensor(ids) for ids in self.prompt.documents(_some(texts))])

    def queries(self, texts: Sequence[str]) -> Part:
        return stack_parts([torch.tensor(ids) for ids in self.prompt.queries(_some(texts))])


class BridgeReader:
    """Units are vectors of a frozen encoder, scaled to variance one. The question is a learned unit of the backbone.

    Queries that are too long for the encoder lose their oldest words, as the template asks; documents their last.
    """

    def __init__(self, setting: TeacherSetting, device: str = "cpu") -> None:
        self.setting = setting
        base = load_base(setting.encoder, device)
        self.tokenizer = base.tokenizer
        limit = int(getattr(base.model.config, "max_position_embeddings", 512))
        self.encoders = {
            "document": TextEncoder(base, min(setting.max_document, limit)),
            "query": TextEncoder(base, min(setting.max_query, limit)),
        }
        self.unit = base.width

    def documents(self, texts: Sequence[str]) -> Part:
        return self._part("document", [_given("document", i, text) for i, text in enumerate(_some(texts))])

    def queries(self, texts: Sequence[str]) -> Part:
        return self._part("query", [self._newest(_given("query", i, text)) for i, text in enumerate(_some(texts))])

    def _newest(self, text: str) -> str:
        """The last words of a text that fit."""
        room = self.encoders["query"].max_length - 2
        if len(text.encode()) <= room:  # a token has at least one byte
            return text
        told = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        if len(told) <= room:
            return text
        kept = text[told[-room][0] :]
        whole = (
            kept if text[told[-room][0] - 1].isspace() else kept.partition(" ")[2]
        )  # a cut word might take more tokens
        return whole or kept

    def _part(self, kind: str, texts: list[str]) -> Part:
        encoder, scale = self.encoders[kind], self.unit**0.5
        if self.setting.units == "pooled":
            vectors = encoder.encode(texts) * scale
            return Part(vectors[:, None], torch.ones(len(texts), dtype=torch.long))
        states = encoder.states(texts)
        if self.setting.units == "chunks":
            states = [chunk_means(one, self.setting.chunks) for one in states]
        return stack_parts([one / one.norm(dim=-1, keepdim=True).clamp_min(1e-9) * scale for one in states])


def chunk_means(states: Tensor, chunks: int) -> Tensor:
    """(min(L, chunks), e): means over spans of equal length of (L, e)."""
    return torch.stack([one.mean(0) for one in states.tensor_split(min(chunks, len(states)))])


def _some(texts: Sequence[str]) -> Sequence[str]:
    if not texts:
        raise ValueError("texts: got none; expected at least one")
    return texts


def _given(kind: str, position: int, text: str) -> str:
    cleaned = plain(text)
    if not cleaned:
        raise ValueError(f"{kind}: number {position} is empty; expected a text with words")
    return cleaned


def make_reader(setting: TeacherSetting, device: str = "cpu") -> Reader:
    """The reader that a setting asks for.

    Raises:
        ValueError: the model or its tokenizer is not there, or its labels are not single tokens.
    """
    if setting.model == "bridge":
        return BridgeReader(setting, device)
    from transformers import AutoTokenizer

    source = find_model(setting.model)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # a damaged file raises anything here; the tokenizers library a bare Exception
        raise ValueError(
            f"model: got {setting.model!r}; its tokenizer cannot be loaded ({str(error)[:200]})"
        ) from error
    return TokenReader(prompt_of(tokenizer, setting))


def prompt_of(tokenizer: Any, setting: TeacherSetting) -> PromptTokens:
    """The template for a tokenizer; labels with the leading space that most vocabularies have, or without."""
    make = partial(PromptTokens, tokenizer, setting.max_document, setting.max_query)
    try:
        return make()
    except ValueError:
        return make(labels=("T", "F"))


def make_backbone(setting: TeacherSetting, reader: Reader, seed: int, device: str = "cpu") -> Backbone:
    """A fresh backbone: the bridge with weights drawn from the seed, or the pretrained language model.

    Raises:
        ValueError: the model cannot be loaded whole from safetensors, has too few positions, or is not causal.
    """
    if isinstance(reader, BridgeReader):
        window = {"pooled": 1, "chunks": setting.chunks, "tokens": reader.encoders["document"].max_length}[
            setting.units
        ]
        drawn = Seeds(seed).generator(Stream.INIT)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**62, (), generator=drawn)))
            backbone: Backbone = BridgeBackbone(reader.unit, setting.width, setting.layers, window=window)
        return backbone.to(device)
    assert isinstance(reader, TokenReader)
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    quiet: Any = logging  # its functions carry no types
    quiet.disable_progress_bar()
    try:
        model, told = AutoModelForCausalLM.from_pretrained(
            find_model(setting.model), trust_remote_code=False, use_safetensors=True, dtype=torch.float32,
            output_loading_info=True,
        )  # fmt: skip
    except Exception as error:  # as above
        raise ValueError(f"model: got {setting.model!r}; it cannot be loaded ({str(error)[:200]})") from error
    if lacking := sorted(told["missing_keys"]):
        raise ValueError(
            f"model: got {setting.model!r}; its file lacks {len(lacking)} weights, the first is {lacking[0]}"
        )
    most, asked = getattr(model.config, "max_position_embeddings", None), setting.max_document + setting.max_query
    if most is not None and asked > most:
        raise ValueError(
            f"max_query: got {setting.max_query} after {setting.max_document} tokens of the document;"
            f" {setting.model} has {most} positions"
        )
    refuse_two_way(TokenBackbone(model, reader.prompt.label_ids, setting.max_document), setting.model)
    if setting.lora_rank:
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(
            r=setting.lora_rank, lora_alpha=2 * setting.lora_rank, target_modules="all-linear", init_lora_weights=True
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = get_peft_model(model, lora).get_base_model()
    return TokenBackbone(model, reader.prompt.label_ids, setting.max_document).to(device)


def refuse_two_way(backbone: Backbone, name: str) -> None:
    """Raise ValueError for a model that looks ahead: a document's states would change with the query behind it."""
    first, *tails = 0, *backbone.labels
    two = Part(torch.tensor([[first, tail] for tail in tails]), torch.tensor([2, 2]))
    with torch.inference_mode():
        here, there = backbone.read(two).states[:, 0].float()
    if not torch.allclose(here, there, atol=1e-4, rtol=1e-3):
        raise ValueError(f"model: got {name!r}, which reads both ways; expected a causal language model")


def with_state(backbone: Backbone, state: Mapping[str, Tensor]) -> Backbone:
    """The same backbone with trained weights: all that train, by name; what stays frozen may be left out.

    Raises:
        ValueError: a trained weight is missing, or one is given that the backbone does not have.
    """
    told = backbone.load_state_dict(state, strict=False)
    trains = {name for name, weight in backbone.named_parameters() if weight.requires_grad}
    if told.unexpected_keys or trains & set(told.missing_keys):
        wrong = [*told.unexpected_keys, *sorted(trains & set(told.missing_keys))]
        raise ValueError(f"model: weights do not fit it, such as {wrong[0]}")
    return backbone


def merged(backbone: Backbone) -> Backbone:
    """The backbone with LoRA factors added into the weights that they belong to (in place); one without any as it is."""
    if not any(".lora_" in name for name in backbone.state_dict()):
        return backbone
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in list(backbone.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            owner, _, last = name.rpartition(".")
            setattr(backbone.get_submodule(owner), last, layer.get_base_layer())
    return backbone
