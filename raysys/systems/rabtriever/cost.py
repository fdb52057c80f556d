"""What a query costs online: a count of operations, and the same work done and timed.

L_D, L_Q document and query tokens; P parameters of the body, d hidden size, h hidden width of the predictor, m documents.

    teacher        m (2 P (L_D + L_Q) + 4 layers d (L_D + L_Q)^2)          cross-encoding, Eq. 3 of the paper with constants
    cached         m (2 P L_Q + 4 layers d L_Q (L_D + L_Q))                keys and values of documents kept; not in the paper
    student        2 P L_Q + 4 layers d L_Q^2 + 4 d h + 2 m d              Eq. 14 with the head folded: L_D does not occur

The paper says "from quadratic to linear"; at these lengths the linear term 2 P L dominates on both sides, and what the student
gains is that nothing depends on L_D and that a document costs 2 d operations [ours].
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from raysys.systems.rabtriever.backbone import Part, Prefix, TokenBackbone
from raysys.systems.rabtriever.predictor import Predictor
from raysys.systems.rabtriever.teacher import Reranker

WAYS = ("teacher", "teacher, prefixes kept", "student")


@dataclass(frozen=True)
class Shape:
    """A backbone's size and the query's length."""

    width: int = 128
    layers: int = 4
    query: int = 32
    hidden: int = 256
    vocabulary: int = 1000

    @property
    def parameters(self) -> int:
        """Of the body that `model` makes: attention 4 d^2, feed-forward 3 d (2 d), per layer."""
        return self.layers * 10 * self.width**2

    def flops(self, way: str, document: int, pool: int) -> int:
        """Operations of one query over a pool, by the formulas above."""
        p, q, d, both = self.parameters, self.query, self.width, self.query + document
        if way == "student":
            return 2 * p * q + 4 * self.layers * d * q * q + 4 * d * self.hidden + 2 * pool * d
        if way == "teacher":
            return pool * (2 * p * both + 4 * self.layers * d * both * both)
        return pool * (2 * p * q + 4 * self.layers * d * q * both)

    def model(self, window: int) -> TokenBackbone:
        """A Qwen2-class language model of this size with random weights: what it costs does not depend on them."""
        from transformers import Qwen2Config, Qwen2ForCausalLM

        config = Qwen2Config(
            vocab_size=self.vocabulary, hidden_size=self.width, intermediate_size=2 * self.width,
            num_hidden_layers=self.layers, num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=32_768,
            tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return TokenBackbone(Qwen2ForCausalLM(config), (3, 4), window)


def read_pairs(reranker: Reranker, documents: Part, query: Part, pairs: Any, prefix: Prefix | None = None) -> Any:
    """The teacher's scores of some documents."""
    return reranker.scores(reranker.states(documents, query, pairs, prefix))


def search(reranker: Reranker, predictor: Predictor, vectors: Any, query: Part) -> Any:
    """The student's scores of all documents, from the query's tokens on."""
    with torch.inference_mode():
        u, c = predictor.fold(reranker.backbone.answer(query), reranker.backbone.direction)
    return (vectors @ u.numpy().T)[:, 0] + c.numpy()


def measure(shape: Shape, lengths: list[int], pool: int, read: int, repeats: int) -> Iterator[dict[str, Any]]:
    """Time each way at each document length: rows with way, document_length, ms (median CPU time of a query), flops.

    The teacher reads `read` documents and is charged pool / read times as much; the student scores the whole pool.
    """
    draw = np.random.default_rng(0)

    def ids(n: int, length: int) -> Part:
        return Part(torch.from_numpy(draw.integers(5, shape.vocabulary, (n, length))), torch.full((n,), length))

    for length in lengths:
        reranker = Reranker(shape.model(length), batch=64)
        documents, query = ids(read, length), ids(1, shape.query)
        pairs = np.stack([np.zeros(read, np.int64), np.arange(read)], 1)
        prefix = reranker.keep(documents)
        vectors = np.resize(reranker.documents(documents).numpy(), (pool, shape.width)).copy()
        predictor = Predictor(shape.width, hidden=shape.hidden).eval()

        ways: dict[str, tuple[Callable[[], Any], float]] = {
            "teacher": (partial(read_pairs, reranker, documents, query, pairs), pool / read),
            "teacher, prefixes kept": (partial(read_pairs, reranker, documents, query, pairs, prefix), pool / read),
            "student": (partial(search, reranker, predictor, vectors, query), 1.0),
        }
        for way, (work, times) in ways.items():
            work()
            taken = []
            for _ in range(repeats):
                began = time.process_time()
                work()
                taken.append(time.process_time() - began)
            yield {
                "way": way, "document_length": length, "ms": 1e3 * times * float(np.median(taken)),
                "flops": shape.flops(way, length, pool),
            }  # fmt: skip
