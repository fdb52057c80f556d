"""The teacher's answers are the same whatever was asked before, held or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raysys.systems.rabtriever.targets import Kept, LocalTargets
from raysys.systems.rabtriever.teacher import Reranker


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), max_size=9), min_size=1, max_size=6),
    st.sampled_from([0, 3, 7, 1000]),
)
def test_rows_held_are_rows_given_whatever_the_order_and_the_room(asks: list[list[tuple[int, int]]], room: int) -> None:
    kept = Kept(4, 5, 2)
    kept.room = room
    truth = torch.arange(40.0).view(4, 5, 2)
    seen: set[tuple[int, int]] = set()
    for ask in asks:
        pairs = np.array(ask, np.int64).reshape(-1, 2)
        missing = kept.missing(pairs)
        assert len(set(map(tuple, missing.tolist()))) == len(missing)
        if room == 1000:
            assert set(map(tuple, missing.tolist())) == set(ask) - seen, "nothing is read twice"
        seen |= set(ask)
        fresh = truth[missing[:, 0], missing[:, 1]]
        assert torch.equal(kept.gather(pairs, missing, fresh), truth[pairs[:, 0], pairs[:, 1]])
        kept.add(missing, fresh)
        assert kept.count <= room


def test_a_table_too_large_for_its_places_holds_nothing_and_still_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    from raysys.systems.rabtriever import targets

    monkeypatch.setattr(targets, "MOST", 10)
    kept = Kept(4, 5, 2)
    pairs = np.array([[1, 2], [1, 2], [0, 0]])
    for _ in range(2):
        missing = kept.missing(pairs)
        assert missing.tolist() == [[0, 0], [1, 2]]
        fresh = torch.from_numpy(missing[:, :1].astype(np.float32)).expand(2, 2)
        assert kept.gather(pairs, missing, fresh)[:, 0].tolist() == [1, 1, 0]
        kept.add(missing, fresh)


def test_local_targets_are_the_teachers_states_in_any_order_of_asking(case: Any, grid: Callable[..., Any]) -> None:
    reranker, pairs = Reranker(case.backbone), grid(4, 5)
    direct = reranker.states(case.documents, case.queries, pairs)
    rng = np.random.default_rng(0)
    for room in (1000, 6):
        targets = LocalTargets(reranker, case.documents, case.queries)
        targets.kept.room = room
        for size in (1, 7, 20, 20, 3):
            rows = rng.choice(20, size)
            found = targets.take(targets.ask(pairs[rows]))
            torch.testing.assert_close(found, direct[rows], atol=1e-5, rtol=1e-5)
        assert not found.requires_grad
        (found * torch.ones(case.backbone.width, requires_grad=True)).sum().backward()  # no inference tensor


def test_bits_do_not_depend_on_what_was_asked_before(case: Any, grid: Callable[..., Any]) -> None:
    reranker, pairs = Reranker(case.backbone), grid(4, 5)
    one, other = (LocalTargets(reranker, case.documents, case.queries) for _ in range(2))
    whole = one.take(one.ask(pairs))
    parts = torch.cat([other.take(other.ask(pairs[i : i + 3])) for i in range(0, 20, 3)])
    assert torch.equal(parts, whole)


def test_documents_beyond_the_room_for_keys_are_read_again_with_the_same_answer(
    case: Any, grid: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    reranker, pairs = Reranker(case.backbone), grid(4, 5)
    direct = reranker.states(case.documents, case.queries, pairs)
    monkeypatch.setattr(LocalTargets, "MOST_KEPT", 1)
    none = LocalTargets(reranker, case.documents, case.queries)
    torch.testing.assert_close(none.take(none.ask(pairs)), direct, atol=1e-5, rtol=1e-5)


def test_a_teacher_of_some_documents_answers_for_those(case: Any) -> None:
    reranker = Reranker(case.backbone)
    mine = np.array([1, 4])
    pairs = np.array([[0, 4], [3, 1], [0, 1]])
    targets = LocalTargets(reranker, case.documents, case.queries, mine)
    found = targets.take(targets.ask(pairs))
    torch.testing.assert_close(found, reranker.states(case.documents, case.queries, pairs), atol=1e-5, rtol=1e-5)
    assert targets.read == 3
    targets.take(targets.ask(pairs))
    assert targets.read == 3
