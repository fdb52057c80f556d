"""Backbones read documents first: their states do not know of a query, of padding, of the cache or of the batch (spec 5.3)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from raysys.systems.rabtriever.backbone import Backbone, BridgeBackbone, Part, TokenBackbone, stack_parts
from raysys.systems.rabtriever.predictor import Predictor
from raysys.systems.rabtriever.reader import refuse_two_way

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def paired(case: Any) -> tuple[Part, Part]:
    """Twenty pairs: every document with every query."""
    d, q = torch.arange(5).repeat(4), torch.arange(4).repeat_interleave(5)
    return case.documents.pick(d), case.queries.pick(q)


def wider(part: Part, columns: int) -> Part:
    """The same texts in an array with more columns of rubbish behind them."""
    shape = (len(part.length), columns, *part.units.shape[2:])
    rubbish = torch.randn(shape) * 50 if part.units.is_floating_point() else torch.randint(40, shape)
    units = torch.cat([part.units, rubbish], 1)
    real = torch.arange(units.shape[1]) < part.length[:, None]
    noise = torch.randn_like(units) * 50 if units.is_floating_point() else torch.randint_like(units, 40)
    return Part(torch.where(real[..., None] if units.dim() == 3 else real, units, noise), part.length)


def whole_states(backbone: Backbone, documents: Part, queries: Part) -> torch.Tensor:
    """All last hidden states (n, L_D + L_Q, d) of pairs, as the body gives them."""
    seen: list[torch.Tensor] = []
    hook = backbone.body.register_forward_hook(lambda _m, _a, out: seen.append(out.last_hidden_state))
    backbone.pairs(documents, queries)
    hook.remove()
    return seen[0]


@torch.no_grad()
def test_a_documents_states_are_the_same_with_and_without_a_query_behind_it(case: Any) -> None:  # (1)
    documents, queries = paired(case)
    alone = case.backbone.read(documents)
    together = whole_states(case.backbone, documents, queries)[:, : alone.states.shape[1]]
    inside = alone.mask.bool()
    assert inside.sum() == documents.length.sum()
    torch.testing.assert_close(together[inside], alone.states[inside], **CLOSE)
    assert torch.isfinite(together).all()


@torch.no_grad()
def test_the_documents_last_state_is_that_of_its_last_unit_whatever_its_length(case: Any) -> None:  # (1), left padding
    batch = case.backbone.read(case.documents).last
    for i in range(5):
        one = case.backbone.read(case.documents.pick(torch.tensor([i])))
        assert one.mask.all()
        torch.testing.assert_close(batch[i], one.states[0, -1], **CLOSE)


@torch.no_grad()
def test_a_teacher_with_kept_documents_answers_as_one_that_reads_all(case: Any) -> None:  # (2)
    documents, queries = paired(case)
    uncached = case.backbone.pairs(documents, queries)
    cached = case.backbone.answer(queries, case.backbone.read(documents, keep=True))
    torch.testing.assert_close(cached, uncached, **CLOSE)
    prefix = case.backbone.read(case.documents, keep=True).pick(torch.arange(5).repeat(4))
    torch.testing.assert_close(case.backbone.answer(queries, prefix), uncached, **CLOSE)
    assert (uncached - case.backbone.answer(queries)).abs().max() > 1e-3, "the document must matter"


@torch.no_grad()
def test_padding_changes_no_state(case: Any) -> None:  # (3)
    documents, queries = paired(case)
    more = 0 if case.kind == "bridge1" else case.backbone.window - documents.units.shape[1]
    padded_documents, padded_queries = wider(documents, more), wider(queries, 5)
    expected = case.backbone.pairs(documents, queries)
    torch.testing.assert_close(case.backbone.pairs(padded_documents, padded_queries), expected, **CLOSE)
    kept = case.backbone.read(padded_documents, keep=True)
    torch.testing.assert_close(case.backbone.answer(padded_queries, kept), expected, **CLOSE)
    torch.testing.assert_close(case.backbone.answer(padded_queries), case.backbone.answer(queries), **CLOSE)
    torch.testing.assert_close(kept.last, case.backbone.read(documents).last, **CLOSE)


@torch.no_grad()
def test_a_pair_alone_has_the_state_that_it_has_in_a_batch(case: Any) -> None:  # (3), (5)
    documents, queries = paired(case)
    batch = case.backbone.pairs(documents, queries)
    for i in range(0, 20, 3):
        one = torch.tensor([i])
        torch.testing.assert_close(case.backbone.pairs(documents.pick(one), queries.pick(one))[0], batch[i], **CLOSE)


@torch.no_grad()
def test_a_permuted_batch_gives_permuted_states(case: Any) -> None:  # (5)
    documents, queries = paired(case)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    expected = case.backbone.pairs(documents, queries)[order]
    torch.testing.assert_close(case.backbone.pairs(documents.pick(order), queries.pick(order)), expected, **CLOSE)


@torch.no_grad()
def test_log_odds_are_the_difference_of_two_rows_of_the_head_and_swapped_labels_negate_them(case: Any) -> None:  # (8)
    backbone = case.backbone
    states = backbone.pairs(*paired(case))
    logits, (yes, no) = backbone.head(states), backbone.labels
    torch.testing.assert_close(backbone.log_odds(states), logits[:, yes] - logits[:, no], **CLOSE)
    expected = -backbone.log_odds(states)
    backbone.labels = no, yes
    assert torch.equal(backbone.log_odds(states), expected)


def test_padded_documents_give_finite_gradients(case: Any) -> None:
    documents, queries = paired(case)
    read = case.backbone.read(documents, keep=True)
    loss = case.backbone.log_odds(case.backbone.answer(queries, read)).square().mean()
    (loss + case.backbone.auxiliary(documents, read, case.queries)).backward()
    got = [p.grad for p in case.backbone.parameters() if p.grad is not None]
    assert len(got) > 10
    assert all(torch.isfinite(g).all() for g in got)


def test_answers_alone_give_the_last_layers_document_states_no_gradient(case: Any) -> None:
    """The reason for the auxiliary loss: only keys and values of lower states reach the answer."""
    documents, queries = paired(case)
    read = case.backbone.read(documents, keep=True)
    read.states.retain_grad()
    case.backbone.log_odds(case.backbone.answer(queries, read)).sum().backward(retain_graph=True)
    assert read.states.grad is None
    case.backbone.auxiliary(documents, read, case.queries).backward()
    assert read.states.grad is not None
    assert read.states.grad.abs().max() > 0


def test_log_odds_stay_float32_under_autocast(case: Any) -> None:
    states = torch.randn(3, case.backbone.width)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(case.backbone.log_odds(states), (states * case.backbone.direction).sum(-1))


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_the_auxiliary_loss_of_a_language_model_is_its_mean_next_token_loss(kind: str, cases: Any) -> None:
    case = cases(kind)
    documents = case.documents
    read = case.backbone.read(documents)
    found = case.backbone.auxiliary(documents, read, case.queries)
    losses = []
    for i in range(5):
        one = documents.pick(torch.tensor([i]))
        logits = case.backbone.head(case.backbone.read(one).states)[0]
        losses.append(F.cross_entropy(logits[:-1], one.units[0, 1:], reduction="none"))
    torch.testing.assert_close(found, torch.cat(losses).mean(), **CLOSE)


def test_the_bridges_auxiliary_loss_is_zero_for_states_that_hold_the_text(cases: Any) -> None:
    case = cases("bridge4")
    for one in case.backbone.leave.values():
        torch.nn.init.zeros_(one.weight)
    same = stack_parts([torch.ones(n, 6) for n in (2, 4, 1)])
    for one in case.backbone.leave.values():
        torch.nn.init.ones_(one.bias)
    assert case.backbone.auxiliary(same, case.backbone.read(same), same).item() == 0
    for one in case.backbone.leave.values():
        torch.nn.init.zeros_(one.bias)
    assert case.backbone.auxiliary(same, case.backbone.read(same), same).item() == pytest.approx(2.0)


def test_a_head_with_a_bias_is_refused() -> None:
    with pytest.raises(ValueError, match="bias"):
        Backbone(torch.nn.Identity(), torch.nn.Linear(4, 4), (0, 1), 3)


def test_a_document_beyond_the_window_is_refused(case: Any) -> None:
    long = wider(case.documents, 9)
    with pytest.raises(ValueError, match=r"document: got \d+ units; the window takes"):
        case.backbone.read(long)


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_causal_models_pass_the_check_that_one_reading_both_ways_fails(kind: str, cases: Any) -> None:
    from transformers import BertConfig, BertModel

    refuse_two_way(cases(kind).backbone, kind)
    torch.manual_seed(0)
    body = BertModel(
        BertConfig(
            vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, initializer_range=0.5
        ),
        add_pooling_layer=False,
    ).eval()  # fmt: skip
    both = Backbone(body, torch.nn.Linear(16, 40, bias=False), (7, 11), 4)
    both.embed_documents = lambda part: (body.get_input_embeddings()(part.units), part.length)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="reads both ways"):
        refuse_two_way(both, "bert")


def test_a_token_table_is_saved_once(cases: Any) -> None:
    case = cases("qwen2")
    assert sum("embed_tokens" in name or "table" in name for name in case.backbone.state_dict()) == 1


def _operations(run: Any) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


def _token_model(positions: int) -> TokenBackbone:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        max_position_embeddings=4096, attn_implementation="eager",
    )  # fmt: skip
    return TokenBackbone(Qwen2ForCausalLM(config).eval(), (1, 2), positions)


def test_online_operations_of_the_student_do_not_depend_on_document_length_and_the_teachers_grow_quadratically() -> (
    None
):  # (22)
    queries = stack_parts([torch.arange(10)])
    lengths = np.array([16, 64, 256, 1024])
    student, teacher, kept = [], [], []
    for length in lengths.tolist():
        backbone, predictor = _token_model(length), Predictor(16)
        documents = stack_parts([torch.arange(length) % 32])
        with torch.no_grad():
            stored, prefix = backbone.read(documents).last, backbone.read(documents, keep=True)

        def online(backbone: Any = backbone, predictor: Any = predictor, stored: Any = stored) -> None:
            u, c = predictor.fold(backbone.answer(queries), backbone.direction)
            _ = u @ stored.T + c

        student.append(_operations(online))
        teacher.append(_operations(lambda b=backbone, d=documents: b.log_odds(b.pairs(d, queries))))
        kept.append(_operations(lambda b=backbone, p=prefix: b.log_odds(b.answer(queries, p))))
    assert len(set(student)) == 1
    c, b, _ = np.polyfit(lengths, teacher, 2)
    assert c > 0
    assert b > 0
    np.testing.assert_allclose(np.polyval(np.polyfit(lengths, teacher, 2), lengths), teacher, rtol=1e-6)
    np.testing.assert_allclose(
        np.polyval(np.polyfit(lengths, kept, 1), lengths), kept, rtol=1e-6
    )  # linear with a cache
    assert kept[0] < teacher[0]
    layers, d = 2, 16
    assert c == pytest.approx(4 * layers * d, rel=1e-6)  # spec 2.7: attention's share is 4 layers d L^2


def test_bridge_units_enter_by_the_side_they_are_on() -> None:
    backbone = BridgeBackbone(6, 16, layers=1, heads=2)
    part = Part(torch.randn(2, 1, 6), torch.ones(2, dtype=torch.long))
    assert not torch.equal(backbone.embed_documents(part)[0][:, 0], backbone.embed_queries(part)[0][:, 0])
    embedded, length = backbone.embed_queries(part)
    assert torch.equal(length, torch.tensor([2, 2]))
    assert torch.equal(embedded[:, 1], backbone.ask.expand(2, -1))
