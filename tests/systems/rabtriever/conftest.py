"""Small models, prompts and a rule task for the tests of the retriever.

Shapes: n queries, m documents, e width of a unit, d hidden size.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raysys.data.retrieval import Queries, Retrieval
from raysys.systems.rabtriever.backbone import Backbone, BridgeBackbone, Part, TokenBackbone, stack_parts
from raysys.systems.rabtriever.examples import Examples
from raysys.systems.rabtriever.task import Problem

sys.path.insert(0, str(Path(__file__).parent))

UNIT, WIDTH, VOCABULARY, WINDOW = 6, 16, 40, 8
KINDS = ("bridge1", "bridge4", "qwen2", "gpt2")


@dataclass
class Case:
    """A random backbone, documents of different length and queries of different length."""

    kind: str
    backbone: Backbone
    documents: Part
    queries: Part


def language_model(kind: str, tied: bool = False, vocabulary: int = VOCABULARY, positions: int = 64) -> Any:
    """A random Qwen2 (rotary positions) or GPT-2 (learned absolute positions) without dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(3)
    if kind == "qwen2":
        return Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=vocabulary, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=1, max_position_embeddings=positions, tie_word_embeddings=tied, initializer_range=0.3,
                bos_token_id=0, eos_token_id=0,
            )
        )  # fmt: skip
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary, n_embd=WIDTH, n_layer=2, n_head=2, n_positions=positions, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, initializer_range=0.3, bos_token_id=0, eos_token_id=0, tie_word_embeddings=tied,
        )
    )  # fmt: skip


def make_case(kind: str) -> Case:
    """Five documents and four queries for one kind of backbone."""
    drawn = torch.Generator().manual_seed(1)
    if kind.startswith("bridge"):
        window = int(kind[-1])
        torch.manual_seed(2)
        backbone: Backbone = BridgeBackbone(UNIT, WIDTH, layers=2, heads=2, window=window)
        torch.nn.init.normal_(backbone.ask)  # type: ignore[arg-type]
        d, q = ([1] * 5, [1] * 4) if window == 1 else ([3, 1, 4, 2, 3], [2, 4, 1, 3])
        documents, queries = (
            stack_parts([torch.randn(n, UNIT, generator=drawn) for n in lengths]) for lengths in (d, q)
        )
    else:
        backbone = TokenBackbone(language_model(kind), (7, 11), WINDOW)
        documents, queries = (
            stack_parts([torch.randint(VOCABULARY, (n,), generator=drawn) for n in lengths])
            for lengths in ([3, 6, 2, 7, 4], [4, 9, 3, 6])
        )
    return Case(kind, backbone.eval(), documents, queries)


@pytest.fixture(params=KINDS)
def case(request: pytest.FixtureRequest) -> Case:
    """Each kind of backbone in turn."""
    return make_case(request.param)


@pytest.fixture
def cases() -> Callable[[str], Case]:
    """One kind of backbone, by name."""
    return make_case


def all_pairs(n: int, m: int) -> np.ndarray:
    """(n * m, 2) of queries and documents, the document changing fastest."""
    return np.stack([np.repeat(np.arange(n), m), np.tile(np.arange(m), n)], 1)


@pytest.fixture
def grid() -> Callable[[int, int], np.ndarray]:
    return all_pairs


def retrieval(answers: np.ndarray, test: np.ndarray, m: int, unseen: tuple[int, ...] = ()) -> Retrieval:
    """A data set without words: which document is right for each query."""

    def split(part: str, right: np.ndarray) -> Queries:
        return Queries(
            tuple(f"{part}{i}" for i in range(len(right))),
            tuple(f"{part} {i}" for i in range(len(right))),
            tuple((int(i),) for i in right),
            ((1,),) * len(right),
            np.full(len(right), -1),
        )

    return Retrieval(
        "rule", "none", tuple(f"d{i}" for i in range(m)), tuple(f"document {i}" for i in range(m)), split("train", answers),
        split("test", test), np.isin(np.arange(m), unseen), "rationale",
    )  # fmt: skip


def rule_task(m: int = 12, train: int = 240, test: int = 48, noise: float = 0.1) -> Problem:
    """Document j is a random vector, a query a noisy copy of another document's vector: the rule j -> j + 1 must be learned."""
    drawn = torch.Generator().manual_seed(0)
    documents = torch.randn(m, UNIT, generator=drawn)
    answers, asked = np.arange(train) % m, np.arange(test) % m

    def queries(right: np.ndarray) -> Part:
        vectors = documents[torch.from_numpy((right + 1) % m)] + noise * torch.randn(len(right), UNIT, generator=drawn)
        return Part(vectors[:, None], torch.ones(len(right), dtype=torch.long))

    data = retrieval(answers, asked, m)
    whole = Part(documents[:, None], torch.ones(m, dtype=torch.long))
    return Problem(data, Examples.of(data), whole, queries(answers), queries(asked))


@pytest.fixture(scope="session")
def rule() -> Problem:
    return rule_task()


@pytest.fixture(scope="session")
def trained(rule: Problem) -> Any:
    """A problem, its trained teacher, and what a student gets of it (`retriever_for_tests.Trained`)."""
    from functools import partial

    from retriever_for_tests import ONCE, TEACHER, Trained, bridge, freeze, teacher_learner

    from raysys.runtime.train import fit_here
    from raysys.systems.rabtriever.targets import LocalTargets
    from raysys.systems.rabtriever.teacher import Reranker

    state = fit_here(None, partial(teacher_learner, rule, TEACHER), ONCE)
    backbone = bridge(rule)
    backbone.load_state_dict(state)
    reranker = Reranker(backbone)
    return Trained(rule, reranker, freeze(reranker, rule), LocalTargets(reranker, rule.documents, rule.train))


CORPUS = [
    "Document: choose the harbour and the pier. Query: we are at the harbour and everything is freezing",
    "Can Query be appropriately responded with Document? If the answer is true, choose T; otherwise, choose F. Answer: T",
    "Answer: F Answer: T what now? people say that the old dock is broken, a falcon together with saffron",
] * 20


def byte_tokenizer() -> Any:
    """A byte-level BPE vocabulary, in which " T" and " F" are tokens and "<T>" is three."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Callable[[str, bool], Path]:
    """The folder of a tiny pretrained language model with its tokenizer."""
    made: dict[tuple[str, bool], Path] = {}

    def folder(kind: str = "qwen2", tied: bool = False) -> Path:
        if (kind, tied) not in made:
            path = tmp_path_factory.mktemp("models") / f"{kind} tied {tied}"
            language_model(kind, tied, len(tokenizer), 256).save_pretrained(path)
            tokenizer.save_pretrained(path)
            made[kind, tied] = path
        return made[kind, tied]

    return folder
