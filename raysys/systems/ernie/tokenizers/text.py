"""Text as byte-level BPE: trained on one's own texts, every text and every byte can be written.

Notable choices
- Merges are learned by `tokenizers`. Its files are not read back: a tokenizer is its list of merges, checked on reading, from
  which the vocabulary follows.
- Special tokens are outside the merges: a text that contains "<eos>" is five ordinary characters, and cannot forge the real one.
- The paper trains on UTF-16BE bytes with BPE dropout, for a vocabulary of many scripts. Here it is UTF-8 without dropout: the
  embedded texts are English, where two bytes per letter would only double the sequences.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from raysys.runtime.config import Config

I64 = NDArray[np.int64]
SPECIALS = ("<pad>", "<bos>", "<eos>", "<boi>", "<eoi>", "<bov>", "<eov>", "<boa>", "<eoa>", "<sep>")
"""The first ids of every vocabulary, in this order."""
FORMAT = 1
LARGEST = 1 << 18
"""Largest vocabulary."""


class TextSetting(Config):
    """The text tokenizer."""

    size: int = Field(512, ge=len(SPECIALS) + 256, le=LARGEST)
    """Vocabulary: 10 special tokens, 256 bytes, the rest merges."""
    characters: int = Field(4_000_000, ge=1)
    """Characters that merges are learned from: the first ones of the training texts."""


class TextTokenizer:
    """Byte-level BPE. `merges` are pairs of ids without the special tokens: bytes first, then earlier merges."""

    SPECIALS = SPECIALS

    def __init__(self, merges: Sequence[tuple[int, int]]) -> None:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        words = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {word: i for i, word in enumerate(words)}
        for a, b in merges:
            if not (0 <= a < len(words) and 0 <= b < len(words)):
                raise ValueError(f"a merge of ({a}, {b}) needs two tokens that come before it")
            joined = words[a] + words[b]
            if joined not in vocabulary:  # two merges may spell the same token
                vocabulary[joined] = len(words)
                words.append(joined)
        if len(words) + len(SPECIALS) > LARGEST:
            raise ValueError(f"a vocabulary has at most {LARGEST} tokens, got {len(words) + len(SPECIALS)}")
        self.merges = tuple((int(a), int(b)) for a, b in merges)
        self._model = Tokenizer(models.BPE(vocab=vocabulary, merges=[(words[a], words[b]) for a, b in self.merges]))
        self._model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self._model.decoder = decoders.ByteLevel()
        byte_of = dict(zip(_visible(), range(256), strict=True))
        self._bytes = [b""] * len(SPECIALS) + [bytes(byte_of[c] for c in word) for word in words]

    @classmethod
    def train(cls, texts: Iterable[str], size: int) -> TextTokenizer:
        """Learn merges until the vocabulary has `size` tokens, or there is nothing left to merge; the same for the same texts."""
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers

        if size < len(SPECIALS) + 256:
            raise ValueError(f"a vocabulary has at least {len(SPECIALS) + 256} tokens, got {size}")
        model = Tokenizer(models.BPE())
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=size - len(SPECIALS), initial_alphabet=alphabet, show_progress=False, limit_alphabet=256
        )
        model.train_from_iterator(texts, trainer)
        learned = json.loads(model.to_str())["model"]
        return cls([(learned["vocab"][a], learned["vocab"][b]) for a, b in learned["merges"]])

    @property
    def size(self) -> int:
        """Tokens of the vocabulary."""
        return len(self._bytes)

    def encode(self, text: str) -> I64:
        """Ids (n,) of a text; never a special one.

        Raises:
            ValueError: the text is no Unicode (it has lone surrogates).
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"a text has a lone surrogate at character {error.start}, which no UTF-8 has") from error
        ids = self._model.encode(text, add_special_tokens=False).ids
        return np.asarray(ids, dtype=np.int64) + len(SPECIALS)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special ones are left out, and bytes that are no UTF-8 become the replacement character."""
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of ids; ValueError for an id that is none."""
        numbers = [int(i) for i in ids]
        for i in numbers:
            if not 0 <= i < self.size:
                raise ValueError(f"a token is 0 to {self.size - 1}, got {i}")
        return b"".join(self._bytes[i] for i in numbers)

    def to_bytes(self) -> bytes:
        """JSON that `from_bytes` reads."""
        return json.dumps({"format": FORMAT, "kind": "byte-level BPE", "merges": self.merges}).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> TextTokenizer:
        """A tokenizer as `to_bytes` wrote it; ValueError if it is anything else."""
        try:
            told = json.loads(data)
            if told["format"] != FORMAT:
                raise ValueError(f"format {told['format']}; this version reads format {FORMAT}")
            merges = [(a, b) for a, b in told["merges"]]
            if not all(type(x) is int for pair in merges for x in pair):
                raise ValueError("merges that are no pairs of numbers")
            return cls(merges)
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"tokenizer: got something that is not a text tokenizer ({error})") from error


def report(tokenizer: TextTokenizer, texts: Iterable[str]) -> dict[str, float]:
    """How well texts are packed: bytes per token, and the share of the vocabulary (without special tokens) that is used."""
    used, count, size = set[int](), 0, 0
    for text in texts:
        ids = tokenizer.encode(text).tolist()
        used.update(ids)
        count += len(ids)
        size += len(text.encode())
    if not count:
        raise ValueError("a report needs at least one text that is not empty")
    return {"bytes per token": size / count, "vocabulary used": len(used) / (tokenizer.size - len(SPECIALS))}


def _visible() -> list[str]:
    """The character by which byte-level BPE writes each byte (GPT-2's table): itself if it can be seen, else one from 256 on."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    place = {byte: chr(byte) for byte in seen}
    place |= {byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in place)}
    return [place[byte] for byte in range(256)]
