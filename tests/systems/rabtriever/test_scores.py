"""Scores of the teacher: log-odds, the paper's Eq. 9 and its orientation, and a reranker that never changes (spec 5.3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raysys.systems.rabtriever.backbone import Part
from raysys.systems.rabtriever.teacher import Reranker, digest, log_odds, paper_eq9

relaxed = settings(deadline=None, max_examples=40)

numbers = st.floats(-30, 30)
LABELS = (2, 0)


@relaxed
@given(st.lists(numbers, min_size=4, max_size=4), numbers)
def test_log_odds_are_the_logit_of_the_share_of_t_and_ignore_a_constant(
    row: list[float], constant: float
) -> None:  # (6)
    logits = torch.tensor([row], dtype=torch.float64)
    p = logits.softmax(-1)[0]
    share = p[LABELS[0]] / (p[LABELS[0]] + p[LABELS[1]])
    z = log_odds(logits, LABELS)[0]
    torch.testing.assert_close(torch.log(p[LABELS[0]] / p[LABELS[1]]), z)
    torch.testing.assert_close(share, torch.sigmoid(z))
    torch.testing.assert_close(log_odds(logits + constant, LABELS)[0], z, atol=1e-12, rtol=1e-12)


@relaxed
@given(st.lists(numbers, min_size=3, max_size=3))
def test_swapped_labels_negate_the_log_odds(row: list[float]) -> None:  # (8)
    logits = torch.tensor([row])
    assert torch.equal(log_odds(logits, (0, 2)), -log_odds(logits, (2, 0)))


@relaxed
@given(st.lists(st.integers(-60, 60), min_size=2, max_size=20, unique=True))
def test_eq_9_falls_as_log_odds_rise_when_both_labels_hold_all_probability(tenths: list[int]) -> None:  # (7)
    z = torch.tensor(sorted(tenths), dtype=torch.float64) / 10
    scores = paper_eq9(torch.stack([z, torch.zeros_like(z)], -1), (0, 1)).double()
    assert (scores.diff() < 0).all()
    assert torch.equal(scores.argsort(), torch.arange(len(z)).flip(0)), "the ranking is exactly reversed"


@pytest.mark.parametrize(("p", "expected"), [(0.9, 0.0438), (0.5, 0.5), (0.1, 0.9562)])
def test_eq_9_puts_a_likely_document_below_an_unlikely_one(p: float, expected: float) -> None:  # (7)
    logits = torch.log(torch.tensor([[p, 1 - p]]))
    assert paper_eq9(logits, (0, 1)).item() == pytest.approx(expected, abs=1e-4)


def test_the_score_matrix_holds_each_pairs_score_with_and_without_kept_documents(
    case: Any, grid: Callable[..., Any]
) -> None:  # (2)
    reranker = Reranker(case.backbone, batch=7)
    scores = reranker.matrix(case.documents, case.queries)
    assert scores.shape == (4, 5)
    kept = reranker.matrix(case.documents, case.queries, reranker.keep(case.documents))
    np.testing.assert_allclose(kept, scores, atol=1e-4)
    for q in range(4):
        for d in range(5):
            one = case.backbone.pairs(case.documents.pick(torch.tensor([d])), case.queries.pick(torch.tensor([q])))
            assert scores[q, d] == pytest.approx(
                log_odds(case.backbone.head(one), case.backbone.labels).item(), abs=1e-4
            )


def test_eq_9_of_the_reranker_uses_the_whole_vocabulary(case: Any) -> None:
    reranker = Reranker(case.backbone)
    states = torch.randn(3, case.backbone.width)
    expected = paper_eq9(states @ case.backbone.head.weight.T, case.backbone.labels)
    torch.testing.assert_close(reranker.scores(states, "paper_eq9"), expected)
    log_p = (states @ case.backbone.head.weight.T).log_softmax(-1)
    yes, no = (log_p[:, label] for label in case.backbone.labels)
    torch.testing.assert_close(expected, yes / (yes + no))


def test_states_do_not_depend_on_what_else_is_asked_for(case: Any, grid: Callable[..., Any]) -> None:  # (5)
    pairs = grid(4, 5)
    whole = Reranker(case.backbone).states(case.documents, case.queries, pairs)
    order = np.random.default_rng(0).permutation(20)
    for batch in (1, 3, 100):
        reranker = Reranker(case.backbone, batch)
        torch.testing.assert_close(
            reranker.states(case.documents, case.queries, pairs[order]), whole[order], atol=1e-5, rtol=1e-5
        )
        some = reranker.states(case.documents, case.queries, pairs[3:4])
        torch.testing.assert_close(some, whole[3:4], atol=1e-5, rtol=1e-5)


def test_states_have_the_same_bits_whatever_other_pairs_share_the_batch(case: Any, grid: Callable[..., Any]) -> None:
    reranker, pairs = Reranker(case.backbone), grid(4, 5)
    whole = reranker.states(case.documents, case.queries, pairs)
    for rows in (slice(0, 1), slice(3, 9), slice(10, 20)):
        assert torch.equal(reranker.states(case.documents, case.queries, pairs[rows]), whole[rows])
    prefix = reranker.keep(case.documents)
    kept = reranker.states(case.documents, case.queries, pairs, prefix)
    few = reranker.keep(case.documents.pick(torch.tensor([2, 3])))
    two = reranker.states(case.documents, case.queries, np.array([[0, 1], [3, 0]]), few)
    assert torch.equal(two, kept[[3, 17]])


def test_documents_and_queries_come_back_in_the_order_given(case: Any) -> None:
    reranker = Reranker(case.backbone, batch=2)
    documents, queries = reranker.documents(case.documents), reranker.queries(case.queries)
    for i in range(4):
        one = torch.tensor([i])
        torch.testing.assert_close(
            documents[i], case.backbone.read(case.documents.pick(one)).last[0], atol=1e-5, rtol=1e-5
        )
        torch.testing.assert_close(queries[i], case.backbone.answer(case.queries.pick(one))[0], atol=1e-5, rtol=1e-5)


def test_a_reranker_takes_no_gradient_and_no_dropout_and_keeps_every_bit(
    case: Any, grid: Callable[..., Any]
) -> None:  # (4)
    before = digest(case.backbone.train())
    reranker = Reranker(case.backbone)
    assert not case.backbone.training
    assert not any(p.requires_grad for p in case.backbone.parameters())
    reranker.matrix(case.documents, case.queries)
    reranker.documents(case.documents)
    assert digest(case.backbone) == before
    with torch.no_grad():
        next(case.backbone.parameters()).view(-1)[0] += 1e-3
    assert digest(case.backbone) != before


def test_no_pairs_give_no_states(case: Any) -> None:
    assert Reranker(case.backbone).states(case.documents, case.queries, np.empty((0, 2), np.int64)).shape == (
        0,
        case.backbone.width,
    )


def test_a_part_picked_by_rows_is_cut_to_its_longest() -> None:
    part = Part(torch.arange(12).view(3, 4), torch.tensor([4, 2, 1]))
    picked = part.pick(torch.tensor([2, 1]))
    assert picked.units.tolist() == [[8, 9], [4, 5]]
    assert picked.length.tolist() == [1, 2]


def test_equal_documents_have_equal_scores_to_the_last_bit(case: Any) -> None:
    twice = case.documents.pick(torch.tensor([0, 1, 2, 0, 3, 1]))
    reranker = Reranker(case.backbone)
    scores = reranker.matrix(twice, case.queries)
    assert np.array_equal(scores[:, [0, 1]], scores[:, [3, 5]])
    stored = reranker.documents(twice)
    assert torch.equal(stored[[0, 1]], stored[[3, 5]])
