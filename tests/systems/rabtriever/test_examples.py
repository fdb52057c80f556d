"""Groups of documents are functions of (seed, step, block), without repetition, without withheld and without own documents."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysys.data.retrieval import Queries, Retrieval
from raysys.runtime.seeds import Seeds
from raysys.systems.rabtriever.examples import Examples, spread

relaxed = settings(deadline=None, max_examples=60)
M, UNSEEN = 11, (2, 7)


def data(itself: tuple[int, ...] = (-1, -1, -1, -1)) -> Retrieval:
    relevant = ((0, 3, 2), (1,), (4, 5, 6), (10,))
    queries = Queries(
        ("a", "b", "c", "d"), ("a", "b", "c", "d"), relevant, tuple((1,) * len(r) for r in relevant), np.array(itself)
    )
    return Retrieval(
        "x",
        "none",
        tuple(map(str, range(M))),
        tuple(map(str, range(M))),
        queries,
        queries,
        np.isin(np.arange(M), UNSEEN),
        "real",
    )


@relaxed
@given(st.integers(0, 1000), st.integers(-1, 50), st.integers(0, 8), st.integers(0, 20), st.booleans(), st.booleans())
def test_a_group_has_a_positive_first_and_no_withheld_own_or_repeated_document(
    seed: int, step: int, block: int, others: int, own: bool, asked: bool
) -> None:
    itself = (8, -1, 2, 9) if own else (-1, -1, -1, -1)  # 2 is withheld anyway
    examples, rows = Examples.of(data(itself)), np.array([0, 1, 2, 3, 0, 2])
    searched = np.array([[0, 1, 6], [0, 1, 2], [7, 6, 5], [8, 3, 4]]) if asked else None
    found, also = examples.groups(Seeds(seed), step, block, rows, others, searched)
    assert found.shape == also.shape
    assert found.shape[1] == 1 + min(others, (8 if not own else 7))
    for q, row, right in zip(rows, found, also, strict=True):
        assert row[0] in examples.positives[q]
        assert not right[0]
        assert len(set(row)) == len(row)
        assert not set(row) & set(UNSEEN)
        assert itself[q] not in row
        assert right[1:].tolist() == [d in examples.positives[q] for d in row[1:]]
    again = examples.groups(Seeds(seed), step, block, rows, others, searched)
    assert np.array_equal(again[0], found)


@relaxed
@given(st.lists(st.sets(st.integers(0, M - 1)), min_size=1, max_size=6), st.sets(st.integers(0, M - 1), max_size=M - 1))
def test_pairs_say_the_same_as_a_mask_of_all_pairs(right: list[set[int]], unseen: set[int]) -> None:
    known = np.array([i for i in range(M) if i not in unseen])
    relevant = tuple(tuple(sorted(row | {int(known[0])})) for row in right)
    names = tuple(map(str, range(len(right))))
    queries = Queries(names, names, relevant, tuple((1,) * len(r) for r in relevant), np.full(len(right), -1))
    examples = Examples.of(replace(data(), train=queries, unseen=np.isin(np.arange(M), list(unseen))))
    mask = np.array([[i in row for i in known] for row in relevant])
    rows = np.arange(len(right))[::-1]
    columns = np.tile(np.arange(len(known)), (len(right), 1))
    assert np.array_equal(examples.relevant(rows, columns), mask[rows])
    assert len(examples.pairs) == mask.sum()


def test_what_is_right_takes_memory_by_pairs_not_by_queries_times_documents() -> None:
    n, m = 40_000, 40_000
    names = tuple(map(str, range(n)))
    one = Queries(names, names, tuple((i,) for i in range(n)), ((1,),) * n, np.full(n, -1))
    examples = Examples.of(Retrieval("x", "none", names, names, one, one, np.zeros(m, bool), "real"))
    arrays = [value for value in vars(examples).values() if isinstance(value, np.ndarray)]
    assert max(array.nbytes for array in arrays) <= 8 * n
    assert examples.relevant(np.array([7, m - 1]), np.array([[7, 8], [0, m - 1]])).tolist() == [
        [True, False],
        [False, True],
    ]


def test_groups_of_other_seeds_steps_and_blocks_are_others() -> None:
    examples, rows = Examples.of(data()), np.array([0, 1, 2, 3] * 5)
    drawn = [examples.groups(Seeds(s), t, b, rows, 4)[0] for s, t, b in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))]
    for i in range(4):
        for j in range(i):
            assert not np.array_equal(drawn[i], drawn[j])


def test_documents_are_drawn_equally_often_and_so_are_positives() -> None:
    examples, rows = Examples.of(data()), np.zeros(300, np.int64)
    found = np.concatenate([examples.groups(Seeds(0), step, 0, rows, 3)[0] for step in range(10)])
    first = np.bincount(found[:, 0], minlength=M) / len(found)
    assert abs(first[0] - 0.5) < 0.03
    assert abs(first[3] - 0.5) < 0.03
    share = np.bincount(found[:, 1:].ravel(), minlength=M)[[1, 4, 5, 6, 8, 9, 10]] / len(found)
    assert np.ptp(share) < 0.05


def test_half_of_the_others_are_the_students_own() -> None:
    examples, rows = Examples.of(data()), np.zeros(400, np.int64)
    searched = np.array([[5, 6, 7], [0, 0, 0], [0, 0, 0], [0, 0, 0]])  # positions among the known: documents 6, 8, 9
    found, _ = examples.groups(Seeds(0), 0, 0, rows, 4, searched)
    assert (np.isin(found[:, 1:], [6, 8, 9]).sum(1) >= 2).all()
    assert len({tuple(sorted(set(row) & {6, 8, 9})) for row in found.tolist()}) >= 3, "which of them changes"


def test_a_pool_of_one_document_gives_a_group_of_one() -> None:
    queries = Queries(("a",), ("a",), ((0,),), ((1,),), np.array([-1]))
    one = Retrieval("x", "none", ("0",), ("0",), queries, queries, np.array([False]), "real")
    found, _ = Examples.of(one).groups(Seeds(0), 0, 0, np.array([0, 0]), 5)
    assert found.tolist() == [[0], [0]]


def test_a_training_query_all_of_whose_documents_are_withheld_is_refused() -> None:
    lost = replace(data().train, relevant=((0,), (2, 7), (4,), (10,)))
    with pytest.raises(ValueError, match="training query b has no relevant document that is not withheld"):
        Examples.of(replace(data(), train=lost))


def test_queries_of_a_block_are_drawn_from_all() -> None:
    examples = Examples.of(data())
    drawn = np.concatenate([examples.queries(Seeds(0), step, 0, 50) for step in range(8)])
    counts: Any = np.bincount(drawn, minlength=4)
    assert (abs(counts - 100) < 40).all()


@relaxed
@given(st.integers(1, 500), st.integers(1, 300))
def test_a_sample_of_rows_is_spread_over_all_of_them(n: int, count: int) -> None:
    rows = spread(n, count)
    assert len(rows) == min(n, count)
    assert rows[0] == 0
    assert (np.diff(rows) >= 1).all()
    assert n - n / len(rows) - 1 <= rows[-1] < n
    if n <= count:
        assert np.array_equal(rows, np.arange(n))
