"""A retriever of the shape of the real one, and indexes made with it, for the tests of serve."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from raysys.systems.rabtriever.build import Builder
from raysys.systems.rabtriever.versions import publish

WIDTH = 48
WORDS = [
    "river",
    "stone",
    "lamp",
    "garden",
    "winter",
    "letter",
    "bridge",
    "copper",
    "silent",
    "morning",
    "harbour",
    "violet",
]


class Toy:
    """u, z: a random projection of character trigrams. Deterministic, and the same for a text whoever shares the batch."""

    width = WIDTH

    def __init__(self, name: str) -> None:
        self.name = name
        self.fingerprint = f"toy-{name}"

    def _vectors(self, texts: Sequence[str], seed: int) -> np.ndarray:
        out = np.zeros((len(texts), WIDTH), np.float32)
        for row, text in zip(out, texts, strict=True):
            if "\u200b" in text:
                raise ValueError(f"texts: got {text!r}; it has no token")
            for i in range(len(text) - 1):
                code = [ord(c) for c in text[i : i + 3]]
                row += np.random.default_rng([seed, *code]).standard_normal(WIDTH).astype(np.float32)
            row /= max(1.0, float(np.linalg.norm(row))) / (1 + len(text) % 5)
        return out

    def queries(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        return self._vectors(texts, 1), np.array([-0.1 * len(text) for text in texts], np.float32)

    def documents(self, texts: Sequence[str]) -> np.ndarray:
        return self._vectors(texts, 1)

    def rerank(self, query: str, documents: Sequence[str]) -> np.ndarray:
        return np.array([-abs(len(query) - len(one)) for one in documents], np.float32)

    def prompt(self, query: str, document: str) -> str:
        return f"Document: {document}\nQuery: {query}\nFits?"


def load_toy(run: str, device: str) -> Any:
    """What build() is given instead of the real loader."""
    return Toy(run)


def corpus(count: int, seed: int = 0) -> dict[str, str]:
    """Documents by id, some of them equal."""
    rng = np.random.default_rng(seed)
    return {f"d{i}": " ".join(rng.choice(WORDS, 2 + i % 4)) for i in range(count)}


def make_index(root: Path, documents: dict[str, str], version: str = "v1", shards: int = 2, run: str = "one") -> Path:
    """A published version made with the retriever `run`."""
    toy = Toy(run)
    builder = Builder(root, version, WIDTH, toy.fingerprint, shards)
    builder.put(0, list(documents), list(documents.values()), toy.documents(list(documents.values())))
    builder.finish()
    publish(root, version)
    return root


class Offline:
    """What a search should answer, from a dictionary of documents."""

    def __init__(self, documents: dict[str, str], run: str = "one") -> None:
        self.toy = Toy(run)
        self.ids, self.texts = list(documents), list(documents.values())
        self.z = self.toy.documents(self.texts).astype(np.float64)

    def scores(self, query: str) -> dict[str, float]:
        """The log-odds of every document."""
        u, c = self.toy.queries([query])
        return dict(zip(self.ids, (self.z @ u[0].astype(np.float64) + float(c[0])).tolist(), strict=True))

    def agrees(self, query: str, results: Sequence[dict[str, Any]], k: int) -> bool:
        """Whether these are the k best, in order, with their scores and texts (equal scores in any order)."""
        scores = self.scores(query)
        best = sorted(scores.values(), reverse=True)[:k]
        texts = dict(zip(self.ids, self.texts, strict=True))
        return (
            len(results) == len(best)
            and len({one["id"] for one in results}) == len(best)
            and all(abs(one["score"] - score) < 1e-4 for one, score in zip(results, best, strict=True))
            and all(abs(scores[one["id"]] - one["score"]) < 1e-4 and texts[one["id"]] == one["text"] for one in results)
        )
