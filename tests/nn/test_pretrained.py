"""Pretrained models: what is loaded whole, and what is refused in one sentence."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from raysys.nn.pretrained import find_model, load_base, read_base

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
COMMON = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny random BERT with MiniLM's tokenizer."""
    BertModel(BertConfig(**COMMON, vocab_size=30522)).save_pretrained(tmp_path)
    for name in TOKENIZER:
        shutil.copy(Path(find_model("minilm")) / name, tmp_path)
    return tmp_path


def without(folder: Path, part: str) -> None:
    """Take the weights whose names hold `part` out of the file."""
    weights = load_file(folder / "model.safetensors")
    kept = {name: value.clone() for name, value in weights.items() if part not in name}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


def configured(folder: Path, **change: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def unworded(folder: Path) -> None:
    for name in ("tokenizer.json", "vocab.txt"):
        (folder / name).unlink()


def unpadded(folder: Path) -> None:
    for name in TOKENIZER:
        (folder / name).unlink()
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0, "b": 1}))).save_pretrained(folder)


def test_a_model_is_read_once_however_it_is_asked_for():
    assert load_base() is load_base("minilm", "cpu") is load_base(name="minilm", device="cpu")
    assert read_base() is not load_base()


def test_a_file_without_the_pooler_is_whole(folder):
    without(folder, "pooler")
    base = read_base(str(folder))
    assert (base.width, base.causal, base.tokenizer.padding_side) == (16, False, "right")


DAMAGES = {
    "weights missing": (lambda f: without(f, "layer.1.attention"), r"lacks, .* encoder.layer.1.attention.* and 9 more"),
    "fewer layers in the file": (lambda f: configured(f, num_hidden_layers=3), "encoder.layer.2.* more"),
    "other shapes": (lambda f: configured(f, intermediate_size=24), r"in another shape, .*intermediate"),
    "no file format": (lambda f: (f / "model.safetensors").write_bytes(b"rubbish" * 9), "header too large"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "safetensors"),
    "no vocabulary": (unworded, "its tokenizer has no vocabulary, only special tokens"),
    "damaged vocabulary": (lambda f: (f / "tokenizer.json").write_text("{rubbish"), "line 1 column 2"),
    "nothing to pad with": (unpadded, "neither a padding nor an end token"),
    "a word for a number": (lambda f: configured(f, hidden_size="x"), "hidden_size"),
    "no such kind": (lambda f: configured(f, model_type="nope"), "model type `nope`"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_model_that_is_not_whole_is_told_in_one_sentence(folder, damage):
    make, said = damage
    make(folder)
    with pytest.raises(ValueError, match=rf"^model: got '.*'; it cannot be loaded \(.*{said}.*\)$"):
        read_base(str(folder))


def test_a_model_that_cannot_be_found_is_said_in_one_sentence(tmp_path):
    for name in (str(tmp_path), "./nowhere"):
        with pytest.raises(ValueError, match=r"model: got .*expected a folder with config\.json"):
            find_model(name)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="it cannot be loaded"):
        read_base(str(tmp_path))
