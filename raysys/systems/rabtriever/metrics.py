"""Recall, reciprocal rank and nDCG of scores, fair to ties: the expected value over all orders of equal scores.

Shapes: n queries, m documents, p (query, right document) pairs of all queries.

Notable choices
- Sorting breaks ties by whatever order the documents have, so a scorer that gives every document the same score may look good
  or bad. Here every order within a group of equal scores is equally likely and the expectation is exact, in closed form: constant
  scores give recall@1 = 1/m and reciprocal rank H_m/m. Without ties the values are trec_eval's (gain = grade, log2 discount).
- What is no candidate (a document that is the query itself, one that is not `allowed`) is taken away before anything is counted,
  from the right documents as well. A score of -inf says "not retrieved": the document still counts as right, and is never found.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from raysys.data.retrieval import Queries

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
RECALL = (1, 3, 5, 10)
FAR = 100
CUTOFF = 10
CHUNK = 1 << 24
"""Scores compared at once."""


def measure(scores: NDArray[np.float32], queries: Queries, allowed: NDArray[np.bool_] | None = None) -> dict[str, F64]:
    """Measures of each query, the mean over random orders of equal scores.

    Args:
        scores: (n, m), larger is better; -inf is not retrieved.
        queries: n queries, their right documents among the m.
        allowed: (m,) the candidates, or None for all.

    Returns:
        recall@1, @3, @5, @10, @100 (that where m is at least 100), mrr@10 and ndcg@10, each (n,); nan for a query none of whose
        right documents is a candidate.

    Raises:
        ValueError: shapes disagree, or a score is nan.
    """
    n, m = len(queries), scores.shape[-1]
    if scores.ndim != 2 or len(scores) != n or (allowed is not None and allowed.shape != (m,)):
        raise ValueError(f"scores: got shape {scores.shape}; expected ({n}, m) for {n} queries, and `allowed` (m,)")
    row = np.repeat(np.arange(n), [len(r) for r in queries.relevant])
    document = np.array([i for r in queries.relevant for i in r], np.int64)
    grade = np.array([g for r in queries.grades for g in r], np.float64)
    if len(document) and not 0 <= document.min() <= document.max() < m:
        raise ValueError(f"scores: got {m} documents; the queries refer to document {document.max()}")
    candidate = np.ones(m, bool) if allowed is None else allowed
    kept = candidate[document] & (document != queries.itself[row])
    row, document, grade = row[kept], document[kept], grade[kept]
    above, tied = _above_and_tied(scores, candidate, queries.itself, row, document)
    retrieved = scores[row, document] > -np.inf

    right = np.bincount(row, minlength=n).astype(np.float64)
    right[right == 0] = np.nan
    out: dict[str, F64] = {}
    for k in (*RECALL, FAR) if m >= FAR else RECALL:
        # The document lies at each of the places above+1 .. above+tied with the same chance.
        chance = np.where(retrieved, np.clip((k - above) / tied, 0, 1), 0)
        out[f"recall@{k}"] = np.bincount(row, chance, n) / right
    out[f"mrr@{CUTOFF}"] = np.where(
        np.isnan(right), np.nan, _first(row[retrieved], above[retrieved], tied[retrieved], n)
    )
    out[f"ndcg@{CUTOFF}"] = _gain(row, above, tied, np.where(retrieved, grade, 0), n) / _ideal(row, grade, n)
    return out


def _above_and_tied(
    scores: NDArray[np.float32], candidate: NDArray[np.bool_], itself: I64, row: I64, document: I64
) -> tuple[I64, I64]:
    """For each right document (p,): how many candidates score more, and how many the same, itself included."""
    above, tied = np.empty(len(row), np.int64), np.empty(len(row), np.int64)
    columns = np.flatnonzero(candidate)
    step = max(1, CHUNK // max(1, len(candidate)))
    for start in range(0, len(scores), step):
        block = scores[start : start + step]
        if np.isnan(block).any():
            raise ValueError("scores: got nan; a score must be a number or -inf")
        own = itself[start : start + step]
        low, high = np.searchsorted(row, [start, start + step])
        for a in range(low, high, step):
            pairs = slice(a, min(a + step, high))
            score = scores[row[pairs], document[pairs]][:, None]
            others = block[row[pairs] - start] if candidate.all() else block[row[pairs] - start][:, columns]
            above[pairs], tied[pairs] = (others > score).sum(1), (others == score).sum(1)
            self_of = own[row[pairs] - start]
            counted = (self_of >= 0) & candidate[self_of]
            its = scores[row[pairs], self_of][:, None]
            above[pairs] -= counted & (its > score)[:, 0]
            tied[pairs] -= counted & (its == score)[:, 0]
    return above, tied


def _first(row: I64, above: I64, tied: I64, n: int) -> F64:
    """(n,) expected 1/rank, up to the cutoff, of the first right document: it lies in the best group that holds one."""
    best = np.full(n, np.iinfo(np.int64).max)
    np.minimum.at(best, row, above)
    first = above == best[row]
    right, size = np.bincount(row[first], minlength=n).astype(np.float64), np.ones(n)
    size[row[first]] = tied[first]
    has = right > 0
    before = np.where(has, best, CUTOFF).astype(np.float64)
    # Of `size` places in random order, `right` of them right: the chance that the first right one is the j-th.
    chance, value = np.where(has, right / size, 0), np.zeros(n)
    for j in range(1, CUTOFF + 1):
        rank = before + j
        value += np.where(rank <= CUTOFF, chance / rank, 0)
        chance = chance * np.clip(size - right - j + 1, 0, None) / np.maximum(size - j, 1)
    return value


DISCOUNT = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(2, CUTOFF + 2)))])
"""Sum of the discounts of the first 0, 1, ..., 10 places."""


def _gain(row: I64, above: I64, tied: I64, grade: F64, n: int) -> F64:
    """(n,) expected discounted gain: each right document gets the mean discount of its group's places."""
    mean = (DISCOUNT[np.minimum(above + tied, CUTOFF)] - DISCOUNT[np.minimum(above, CUTOFF)]) / tied
    return np.bincount(row, grade * mean, n).astype(np.float64)


def _ideal(row: I64, grade: F64, n: int) -> F64:
    """(n,) discounted gain of the best order, nan where there is nothing right."""
    order = np.lexsort((-grade, row))
    row, grade = row[order], grade[order]
    place = np.arange(len(row)) - np.searchsorted(row, row)
    near = place < CUTOFF
    ideal = np.bincount(row[near], grade[near] * np.diff(DISCOUNT)[place[near]], n)
    return np.where(ideal > 0, ideal, np.nan)
