"""Frozen bodies of other kinds: which work, which are refused before a run, and how pairs of texts enter."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

from raysys.nn.body import TextBody
from raysys.nn.lora import find_layout
from raysys.nn.pretrained import Base, load_base

COMMON = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 30522,
}
KINDS = {
    "bert": {},
    "llama": {"num_key_value_heads": 2},
    "electra": {"embedding_size": 16},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "modernbert": {"pad_token_id": 0},
    "roberta": {"pad_token_id": 1, "max_position_embeddings": 130},
    "bloom": {},
    "deberta-v2": {},
}


def body_of(kind: str, layers: int = 1, max_length: int = 16, tokenizer: object = None) -> TextBody:
    """A tiny random model of a kind, its top layers adapted."""
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(kind, **COMMON, **KINDS[kind])).eval().requires_grad_(False)
    base = Base(kind, model, tokenizer or load_base().tokenizer, kind in ("llama", "opt", "bloom"))
    return TextBody(base, find_layout(model, ("Wqkv",) if kind == "modernbert" else (), layers, 4, 8), max_length)


@pytest.mark.parametrize("layers", [0, 1])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "deberta-v2"])
def test_kept_and_whole_passes_agree_for_models_of_many_kinds(kind, layers):
    body_of(kind, layers).check()


def test_a_kind_whose_layers_cannot_be_passed_over_is_refused_before_a_run():
    body_of("deberta-v2", layers=0).check()
    with pytest.raises(
        ValueError, match=r"^model: got 'deberta-v2'; its kept and whole .* cannot be run \(ValueError: .*\)$"
    ):
        body_of("deberta-v2").check()


def test_a_kind_whose_passes_differ_is_refused_before_a_run(monkeypatch):
    body = body_of("bert")
    kept = body.lower_states
    monkeypatch.setattr(body, "lower_states", lambda texts: [states + 0.1 * states.flip(-1) for states in kept(texts)])
    with pytest.raises(ValueError, match=r"^model: got 'bert'; its kept and whole passes differ by 0\.\d+$"):
        body.check()


@pytest.mark.parametrize(("kind", "most"), [("bert", 512), ("roberta", 128)])
def test_more_tokens_than_the_model_has_positions_for_are_refused(kind, most):
    body = body_of(kind, max_length=most)
    body.pooled_tokens(
        body.tokens(["word " * 600]), *(torch.zeros(1, n) for n in (body.layout.size_a, body.layout.size_b))
    )
    with pytest.raises(ValueError, match=f"max_length: got 1024; this model takes at most {most} tokens"):
        body_of(kind, max_length=1024)


def test_any_length_is_taken_by_a_model_without_positions():
    assert body_of("bloom", max_length=100_000).max_length == 100_000


def byte_level() -> PreTrainedTokenizerFast:
    """One token a byte and no template for pairs, as GPT-2's would be without merges."""
    letters = {letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))}
    made = Tokenizer(BPE(letters, []))
    made.pre_tokenizer = ByteLevel(add_prefix_space=False)
    made.decoder = ByteLevelDecoder()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="a")


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_newline_parts_pairs_where_the_tokenizer_puts_nothing_between(kind):
    body = body_of(kind, max_length=8, tokenizer=byte_level())
    joined = body.tokens(["ab\nc"])["input_ids"]
    assert torch.equal(body.tokens(["ab"], ["c"])["input_ids"], joined)
    assert not torch.equal(body.tokens(["a"], ["bc"])["input_ids"], joined)
    cut = body.base.tokenizer.decode(body.tokens(["long " * 9], ["yes"])["input_ids"][0])
    assert cut == "long\nyes"  # the longer text is cut, the newline stays


def test_a_template_of_the_tokenizer_is_left_as_it_is():
    body = body_of("bert")
    assert body.base.tokenizer.decode(body.tokens(["a"], ["b"])["input_ids"][0]) == "[CLS] a [SEP] b [SEP]"
