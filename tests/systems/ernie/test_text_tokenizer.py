"""Byte-level BPE: every text comes back, special tokens cannot be forged, files are checked."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysys.data.multimodal import load_multimodal
from raysys.systems.ernie.stream import Special
from raysys.systems.ernie.tokenizers.text import SPECIALS, TextTokenizer, report

TRAIN = [item.text for item in load_multimodal().train("lm")]
TOKENIZER = TextTokenizer.train(TRAIN, 512)


def test_special_tokens_are_those_of_the_stream() -> None:
    assert tuple(f"<{s.name.lower()}>" for s in sorted(Special)) == SPECIALS
    assert TOKENIZER.size == 512


@given(st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_every_text_comes_back(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert ids.dtype == np.int64
    assert TOKENIZER.decode(ids) == text
    assert len(TOKENIZER.decode_bytes(ids)) == len(text.encode())
    assert (ids >= len(SPECIALS)).all()


@given(st.binary(max_size=40))
@settings(max_examples=200, deadline=None)
def test_every_byte_can_be_written(data: bytes) -> None:
    """256 tokens are the single bytes, so ids exist for any bytes, UTF-8 or not."""
    single = {TOKENIZER.decode_bytes([i]): i for i in range(TOKENIZER.size)}
    ids = [single[bytes([b])] for b in data]
    assert TOKENIZER.decode_bytes(ids) == data
    assert TOKENIZER.decode(ids) == data.decode(errors="replace")


@pytest.mark.parametrize("text", [*SPECIALS, "a <eos> b<bos>", "</s>[PAD]"])
def test_a_text_cannot_forge_special_tokens(text: str) -> None:
    assert (TOKENIZER.encode(text) >= len(SPECIALS)).all()
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_special_tokens_are_left_out_of_the_text() -> None:
    ids = [Special.BOS, *TOKENIZER.encode("hello"), Special.EOS, Special.PAD]
    assert TOKENIZER.decode(ids) == "hello"


def test_ids_are_those_that_the_library_gives() -> None:
    """The vocabulary rebuilt from merges is the one that was learned."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator(
        TRAIN, trainers.BpeTrainer(vocab_size=502, initial_alphabet=alphabet, show_progress=False)
    )
    for text in TRAIN[:50]:
        assert (np.asarray(model.encode(text).ids) + 10).tolist() == TOKENIZER.encode(text).tolist()


def test_training_is_repeatable_and_survives_writing() -> None:
    again = TextTokenizer.train(TRAIN, 512)
    assert again.merges == TOKENIZER.merges
    read = TextTokenizer.from_bytes(TOKENIZER.to_bytes())
    assert read.merges == TOKENIZER.merges
    assert read.encode(TRAIN[7]).tolist() == TOKENIZER.encode(TRAIN[7]).tolist()


def test_without_merges_a_token_is_a_byte() -> None:
    plain = TextTokenizer.train([], 266)
    assert plain.size == 266
    assert len(plain.encode("häß")) == 5


def test_merges_shorten_held_out_text() -> None:
    test = [item.text for item in load_multimodal().test("lm")]
    told = report(TOKENIZER, test)
    assert told["bytes per token"] > 1.9  # 1.94; a vocabulary of bytes alone has 1
    assert told["vocabulary used"] > 0.6  # 0.65: no control characters, no bytes above 127
    assert report(TextTokenizer.train([], 266), test)["bytes per token"] == 1


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{}", b"[]", b"\xff", b'{"format": 2, "merges": []}', b'{"format": 1, "merges": 5}', b"null",
        b'{"format": 1, "merges": [[0, 999]]}', b'{"format": 1, "merges": [[0, -1]]}', b'{"format": 1, "merges": [[0, 1, 2]]}',
        b'{"format": 1, "merges": [["a", "b"]]}', b'{"format": 1, "merges": [[true, 1]]}', b'{"format": 1, "merges": [[0.5, 1]]}',
    ],
)  # fmt: skip
def test_other_files_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="not a text tokenizer"):
        TextTokenizer.from_bytes(data)


def test_wrong_calls_are_refused() -> None:
    with pytest.raises(ValueError, match="surrogate"):
        TOKENIZER.encode("a\ud800")
    with pytest.raises(ValueError, match="0 to 511"):
        TOKENIZER.decode([512])
    with pytest.raises(ValueError, match="at least 266"):
        TextTokenizer.train(["a"], 100)
    with pytest.raises(ValueError, match="at least one text"):
        report(TOKENIZER, [""])
    assert json.loads(TOKENIZER.to_bytes())["format"] == 1
