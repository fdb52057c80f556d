"""Many adapters in one forward pass: the same predictions as one at a time, and as peft's own. No Ray."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from served import LABELS, TEXTS, write_run

from raysys.nn.lora import import_adapter
from raysys.runtime.sentences import UserError
from serve.batching import Batcher
from serve.refusal import Refused
from serve.stack import Item, Stack, chunks

NAMES = ["consensus", *(f"peer-{i:03d}" for i in range(5))]


@pytest.fixture(scope="module")
def stack(run: Path) -> Stack:
    return Stack(str(run))


def mixed(stack: Stack) -> list[Item]:
    return [Item(text, None, stack.read(name)) for text, name in zip(TEXTS, NAMES, strict=True)]


def test_a_mixed_batch_predicts_what_each_peft_model_predicts_alone(stack: Stack, run: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModel

    from raysys.nn.pretrained import find_model

    ours = stack.probabilities(mixed(stack))
    for text, name, row in zip(TEXTS, NAMES, ours, strict=True):
        base = AutoModel.from_pretrained(find_model("minilm"))
        model = PeftModel.from_pretrained(base, str(run / "adapters" / name)).eval()
        with torch.inference_mode():
            hidden = model(**stack.body.tokens([text])).last_hidden_state[0]
            theirs = (stack.head @ hidden.mean(0)).softmax(-1)
        assert np.abs(np.array(row) - theirs.numpy()).max() < 1e-5


def test_adapters_differ_so_that_a_mix_up_would_show(stack: Stack) -> None:
    rows = np.array(stack.probabilities([Item(TEXTS[0], None, stack.read(name)) for name in NAMES]))
    gaps = np.abs(rows[:, None] - rows[None]).max(-1) + np.eye(len(NAMES))
    assert gaps.min() > 1e-3


def test_padding_and_company_do_not_change_a_prediction(stack: Stack) -> None:
    items = mixed(stack)
    alone = np.array([stack.probabilities([item])[0] for item in items])
    together = np.array(stack.probabilities(items))
    reversed_order = np.array(stack.probabilities(items[::-1]))[::-1]
    long = Item("and so on " * 60, None, items[0].factors)
    crowded = np.array(stack.probabilities([*items, *[long] * 5]))[: len(items)]
    for other in (together, reversed_order, crowded):
        assert np.abs(alone - other).max() < 1e-6
    padded = stack.body.tokens([items[2].text, long.text])
    with torch.inference_mode():  # forced into one pass: 3 tokens padded to 48
        factors = [torch.stack([item.factors[i] for item in (items[2], long)]) for i in (0, 1)]
        row = (stack.body.pooled_tokens(padded, *factors)[0] @ stack.head.T).softmax(-1)
    assert np.abs(row.numpy() - alone[2]).max() < 1e-6


def test_chunks_cover_a_batch_once_and_cost_least() -> None:
    rng = np.random.default_rng(0)
    for fixed in (0, 20, 10_000):
        lengths = rng.integers(1, 60, 9).tolist()
        made = chunks(lengths, fixed)
        assert sorted(i for part in made for i in part) == list(range(9))

        def cost(parts: list[list[int]], lengths: list[int] = lengths, fixed: int = fixed) -> int:
            return sum(len(part) * max(lengths[i] for i in part) + fixed for part in parts)

        order = sorted(range(9), key=lengths.__getitem__)
        every = [
            [part.tolist() for part in np.split(np.array(order), np.flatnonzero([cuts >> i & 1 for i in range(8)]) + 1)]
            for cuts in range(256)
        ]
        assert cost(made) == min(map(cost, every))
    assert len(chunks([5] * 32, 64)) == 1


@pytest.mark.parametrize(
    ("name", "status", "said"),
    [
        ("peer-007", 404, r"adapter: got 'peer-007'; this run has none of that name; did you mean peer-00\d"),
        ("../../etc", 404, "none of that name"),
        ("peer-cut", 500, "peer-cut: is no whole peft adapter"),
        ("peer-empty", 500, "peer-empty: is no whole peft adapter"),
        ("peer-wide", 500, "peer-wide: has rank 8 .* expected the same .* as consensus"),
    ],
)
def test_what_cannot_be_served_is_refused_with_a_sentence(stack: Stack, name: str, status: int, said: str) -> None:
    with pytest.raises(Refused) as refused:
        stack.read(name)
    assert refused.value.status == status
    assert refused.match(said)


def test_an_exported_adapter_is_read_back_bit_for_bit(stack: Stack) -> None:
    layout, a, b = import_adapter(stack.artifact.storage, "peer-001", stack.shapes)
    assert layout == stack.body.layout
    assert torch.equal(a, stack.read("peer-001").a)
    assert torch.equal(b, stack.read("peer-001").b)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 2}, "format: got 2"),
        ({"precision": "half"}, "precision: got 'half'"),
        ({"max_length": 1024}, "max_length: got 1024; this model takes at most 512 tokens"),
        ({"labels": ["one"]}, "labels"),
        ({"model": "/no/such/folder"}, "model: got '/no/such/folder'"),
        ({"labels": [*LABELS, "more"]}, r"expected finite numbers \(4, 384\)"),
    ],
)
def test_an_artifact_that_is_not_whole_is_told(tmp_path: Path, change: dict, said: str) -> None:
    path = write_run(tmp_path, ["only"]) / "adapters" / "classifier.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises((UserError, ValueError), match=said):
        Stack(str(tmp_path))


def test_the_precision_of_the_run_is_that_of_its_answers(tmp_path: Path) -> None:
    path = write_run(tmp_path, ["only"]) / "adapters" / "classifier.json"
    rows = []
    for told in ({}, {"precision": "float32"}, {"precision": "bfloat16"}):
        path.write_text(json.dumps(json.loads(path.read_text()) | told))
        stack = Stack(str(tmp_path))
        rows.append(np.array(stack.probabilities([Item(text, None, stack.read("only")) for text in TEXTS])))
    assert np.array_equal(rows[0], rows[1])
    assert 0 < np.abs(rows[0] - rows[2]).max() < 0.05


def test_one_text_that_fails_does_not_fail_those_it_shares_a_pass_with(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = stack.body.tokens

    def fragile(first: list[str], second: list[str] | None = None) -> object:
        if "no" in first:
            raise RuntimeError("no")
        return tokens(first, second)

    async def ask(items: list[Item]) -> list[object]:
        batcher: Batcher[Item, list[float]] = Batcher(stack.probabilities, 8, 0.05)
        return await asyncio.gather(*map(batcher, items), return_exceptions=True)

    items = mixed(stack)
    alone = [stack.probabilities([item])[0] for item in items]
    monkeypatch.setattr(stack.body, "tokens", fragile)
    for item, row, expected in zip(items, asyncio.run(ask(items)), alone, strict=True):
        assert isinstance(row, RuntimeError) if item.text == "no" else row == expected


def test_a_run_without_adapters_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no .*classifier.json"):
        Stack(str(tmp_path))
    with pytest.raises(UserError, match="holds no adapter that can be read"):
        Stack(str(write_run(tmp_path, [])))


def test_pairs_of_texts_are_seen_as_pairs(tmp_path: Path) -> None:
    stack = Stack(str(write_run(tmp_path, ["only"], pair=True)))
    factors = stack.read("only")
    rows = np.array(stack.probabilities([Item("a b", "c", factors), Item("a", "b c", factors)]))
    assert np.abs(rows[0] - rows[1]).max() > 1e-4
