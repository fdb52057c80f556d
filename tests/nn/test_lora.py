"""LoRA buffers, files and the frozen body under them."""

import json

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForFeatureExtraction, PeftModel
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

from raysys.nn.body import TextBody, pool
from raysys.nn.lora import (
    GroupedLora,
    Layout,
    export_adapter,
    find_layout,
    import_adapter,
    linear_shapes,
    load_factors,
    peft_factors,
    peft_model,
)
from raysys.nn.pretrained import Base, find_model, load_base, read_base
from raysys.nn.textstore import TextStore
from raysys.runtime.storage import Storage

LAYOUT = Layout(("x", "y"), ((5, 7), (3, 4)), 2, 6.0)


def small(kind):
    torch.manual_seed(0)
    common = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "vocab_size": 30522,
    }
    model = (
        BertModel(BertConfig(**common)) if kind == "bert" else LlamaModel(LlamaConfig(**common, num_key_value_heads=2))
    )
    return Base(kind, model.eval().requires_grad_(False), load_base().tokenizer, kind == "llama")


def drawn(layout, k=3):
    g = torch.Generator().manual_seed(1)
    return torch.randn(k, layout.size_a, generator=g) * 0.1, torch.randn(k, layout.size_b, generator=g) * 0.1


def test_flat_buffers_are_cut_and_joined_without_loss():
    a, b = drawn(LAYOUT)
    assert [tuple(x.shape) for x in LAYOUT.split_a(a)] == [(3, 2, 7), (3, 2, 4)]
    assert [tuple(x.shape) for x in LAYOUT.split_b(b)] == [(3, 5, 2), (3, 3, 2)]
    assert torch.equal(LAYOUT.join(LAYOUT.split_a(a)), a)
    assert torch.equal(LAYOUT.join(LAYOUT.split_b(b)), b)
    assert (LAYOUT.size_a, LAYOUT.size_b, LAYOUT.scale) == (22, 16, 3.0)


def test_minilm_has_the_adapted_layers_and_sizes_that_peft_has():
    layout = find_layout(load_base().model, (), 0, 8, 16)
    assert layout.size_a + layout.size_b == 73_728
    assert len(layout.modules) == 12
    top = find_layout(load_base().model, (), 2, 8, 16)
    assert top.modules == layout.modules[-4:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((("qwery",), 0), "no layer of BertModel has such a name"),
        (((), 9), "layers: got 9; this model has 3"),
        (("LayerNorm",), "is a LayerNorm; only torch.nn.Linear"),
    ],
)
def test_what_cannot_be_adapted_is_refused(options, message):
    targets, layers = options if len(options) == 2 else (options, 0)
    with pytest.raises(ValueError, match=message):
        find_layout(small("bert").model, targets, layers, 8, 16)


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("layers", [0, 1])
def test_kept_lower_states_give_what_the_whole_model_gives(kind, layers):
    base = small(kind)
    layout = find_layout(base.model, (), layers, 4, 8)
    body = TextBody(base, layout, 16)
    texts = ["a red car", "the quick brown fox jumps over it", "no", "why is it so late today"]
    store = TextStore(body, texts)
    a, b = drawn(layout, 2)
    rows = np.array([[3, 1], [0, 2]])
    kept = body.pooled(store.of(rows), rows, a, b)
    for k in range(2):
        whole = body.pooled_tokens(body.tokens([texts[i] for i in rows[k]]), a[k : k + 1], b[k : k + 1])
        assert (kept[k] - whole).abs().max() < 1e-5


def test_texts_are_encoded_alike_whichever_are_asked_for_first():
    base = small("bert")
    body = TextBody(base, find_layout(base.model, (), 1, 4, 8), 16)
    texts = [f"text number {i} " + "word " * (i % 7) for i in range(200)]
    one, other = TextStore(body, texts), TextStore(body, texts)
    one.of(np.array([5]))
    x, y = one.of(np.array([150])), other.of(np.arange(200))
    for encoded in (x, y):
        at, size = int(encoded.start[150]), int(encoded.length[150])
        assert torch.equal(encoded.hidden[at : at + size], y.hidden[int(y.start[150]) :][:size])
    assert (x.start < 0).any()  # what nobody asked for was not computed


def test_bfloat16_products_are_close_and_factors_stay_float32():
    base = load_base()
    layout = find_layout(base.model, (), 2, 8, 16)
    exact, half = TextBody(base, layout, 32), TextBody(base, layout, 32, bf16=True)
    a, b = drawn(layout, 2)
    made = exact.tokens(["a red car", "where is it"])
    b.requires_grad_(True)
    x, y = exact.pooled_tokens(made, a, b), half.pooled_tokens(made, a, b)
    assert 0 < (x - y).abs().max() < 0.05
    (grad,) = torch.autograd.grad(y.square().sum(), b)
    assert grad.dtype == torch.float32


def test_a_shift_of_the_frozen_weights_is_a_change_of_them():
    base = small("bert")
    layout = find_layout(base.model, (), 1, 4, 8)
    body = TextBody(base, layout, 16)
    a, b = layout.init(torch.Generator().manual_seed(0))
    shift = [torch.randn(shape, generator=torch.Generator().manual_seed(2)) * 0.1 for shape in layout.shapes]
    texts = ["a red car", "where is it"]
    rows = np.array([[0, 1]])
    store = TextStore(body, texts)
    shifted = body.pooled(store.of(rows), rows, a[None], b[None], shift)[0]
    with torch.no_grad():
        for name, change in zip(layout.modules, shift, strict=True):
            base.model.get_submodule(name).weight.add_(change)
        made = body.tokens(texts)
        changed = pool(base.model(**made).last_hidden_state, made["attention_mask"], False)
    assert (shifted - changed).abs().max() < 1e-5


def test_an_exported_adapter_loads_in_plain_peft_with_the_same_logits(tmp_path):
    base = load_base()
    layout = find_layout(base.model, (), 2, 8, 16)
    a, b = drawn(layout, 1)
    export_adapter(Storage(str(tmp_path)), "peer-000", layout, a[0], b[0], find_model("minilm"))
    body = TextBody(base, layout, 32)
    made = body.tokens(["a red car", "where is it"])
    ours = body.pooled_tokens(made, a, b)
    fresh = read_base("minilm").model
    plain = PeftModel.from_pretrained(fresh, str(tmp_path / "peer-000")).eval()
    theirs = pool(plain(**made).last_hidden_state, made["attention_mask"], False)
    assert (ours - theirs).abs().max() < 1e-5
    assert ours.abs().max() > 0.1
    told = AutoPeftModelForFeatureExtraction.from_pretrained(str(tmp_path / "peer-000"))  # by the file alone
    assert torch.equal(layout.join([p.detach() for p in peft_factors(told, layout)[1]]), b[0])
    again, a2, b2 = import_adapter(Storage(str(tmp_path)), "peer-000", linear_shapes(base.model))
    assert again == layout
    assert torch.equal(a2, a[0])
    assert torch.equal(b2, b[0])


def test_factors_written_into_peft_are_read_back_and_change_it():
    base = small("bert")
    layout = find_layout(base.model, (), 0, 4, 8)
    model = peft_model(base.model, layout)
    a, b = drawn(layout, 1)
    load_factors(model, layout, a[0], b[0])
    found = [layout.join([p.detach() for p in group]) for group in peft_factors(model, layout)]
    assert torch.equal(found[0], a[0])
    assert torch.equal(found[1], b[0])


def test_damaged_or_foreign_adapters_are_refused_with_one_sentence(tmp_path):
    base = small("bert")
    layout = find_layout(base.model, (), 1, 4, 8)
    a, b = drawn(layout, 1)
    storage, shapes = Storage(str(tmp_path)), linear_shapes(base.model)
    export_adapter(storage, "x", layout, a[0], b[0], "base")
    weights, config = tmp_path / "x" / "adapter_model.safetensors", tmp_path / "x" / "adapter_config.json"
    whole, about = weights.read_bytes(), json.loads(config.read_text())
    weights.write_bytes(whole[:-9])
    with pytest.raises(ValueError, match="is no whole peft adapter"):
        import_adapter(storage, "x", shapes)
    weights.write_bytes(whole)
    for change, message in (
        ({"peft_type": "IA3"}, "expected plain LoRA"),
        ({"use_dora": True}, "use_dora"),
        ({"r": 5}, "expected"),
        ({"r": 0}, "got r 0, lora_alpha 8; r >= 1"),
        ({"lora_alpha": float("nan")}, "lora_alpha nan;"),
        ({"lora_alpha": float("inf")}, "lora_alpha inf;"),
        ({"lora_alpha": -8}, "lora_alpha -8;"),
    ):
        config.write_text(json.dumps(about | change))
        with pytest.raises(ValueError, match=message):
            import_adapter(storage, "x", shapes)
    config.write_text(json.dumps(about))
    with pytest.raises(ValueError, match="fit layers of the base model"):
        import_adapter(storage, "x", {k: v for k, v in shapes.items() if "query" not in k})
    with pytest.raises(ValueError, match="is no whole peft adapter"):
        import_adapter(storage, "nowhere", shapes)
    export_adapter(storage, "x", layout, a[0] * float("nan"), b[0], "base")
    with pytest.raises(ValueError, match="not finite"):
        import_adapter(storage, "x", shapes)


def test_adapters_leave_the_model_they_were_made_on_alone():
    base = small("bert")
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    body = TextBody(base, find_layout(base.model, (), 0, 4, 8), 16)
    assert isinstance(body.lora, GroupedLora)
    after = base.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
