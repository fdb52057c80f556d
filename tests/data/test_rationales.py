"""The generated retrieval tasks: what must hold for their ceilings to be true."""

import re
from collections import Counter

import numpy as np
import pytest

from raysys.data import rationales
from raysys.data.facts import FACTS, Facts
from raysys.data.rationales import Rationale


def words(text):
    return set(re.findall(r"[a-z0-9]+", text.lower()))


def listed(*groups):
    return {word for group in groups for family in group for item in family for word in words(item)}


def families(groups, text):
    return [i for i, family in enumerate(groups) if words(text) & set(family)]


def test_no_query_shares_a_word_with_any_document_over_the_whole_vocabulary():
    asks = [re.sub(r"\{.\}", " ", one) for one in (*rationales.QUERIES, rationales.COMPANION)]
    says = [re.sub(r"\{.\}", " ", one) for one in (*rationales.DOCUMENTS, rationales.MARK)]
    query = listed(rationales.PLACES, rationales.STATES, rationales.COMPANIONS, [asks])
    document = listed(rationales.THINGS, rationales.MANNERS, rationales.MARKS, [says])
    assert len(query) > 140
    assert len(document) > 140
    assert query.isdisjoint(document)


def test_every_attribute_word_belongs_to_one_family_only():
    for side in (("PLACES", "STATES", "COMPANIONS"), ("THINGS", "MANNERS", "MARKS")):
        counts = Counter(word for name in side for family in getattr(rationales, name) for word in family)
        assert set(counts.values()) == {1}


@pytest.mark.parametrize("documents", [192, 576])
def test_one_to_one_pairings_of_families_give_the_right_document_of_every_query(documents):
    task = Rationale(documents=documents).generate()
    assert len(set(task.documents)) == documents
    pairs = (("PLACES", "THINGS"), ("STATES", "MANNERS"), ("COMPANIONS", "MARKS"))[: 2 if documents == 192 else 3]
    for asked in (task.train, task.test):
        for query, document in ((getattr(rationales, a), getattr(rationales, b)) for a, b in pairs):
            rule = {}
            for text, i in zip(asked.texts, asked.answer, strict=True):
                (said,), (named,) = families(query, text), families(document, task.documents[i])
                assert rule.setdefault(said, named) == named
            assert len(set(rule.values())) == len(rule)


def test_the_pool_holds_every_combination_once():
    pool = Rationale(documents=384).generate().documents
    kinds = [
        tuple(families(g, text)[0] for g in (rationales.THINGS, rationales.MANNERS, rationales.MARKS)) for text in pool
    ]
    assert len(set(kinds)) == 384


@pytest.mark.parametrize("task", [Rationale(), Rationale(documents=384, unseen=0.5), Facts()])
def test_withheld_documents_are_never_trained_on_and_half_of_the_test_asks_for_them(task):
    made = task.generate()
    share = task.unseen if isinstance(task, Rationale) else round(task.unseen * task.documents / 6) * 6 / task.documents
    assert made.unseen.sum() == round(share * task.documents)
    assert not made.unseen[list(made.train.answer)].any()
    assert made.unseen[list(made.test.answer)].sum() == task.test // 2
    assert set(made.train.answer) == set(np.flatnonzero(~made.unseen))
    assert set(made.train.texts).isdisjoint(made.test.texts)
    assert len(set(made.train.texts)) == task.train


def test_every_place_and_state_of_a_withheld_combination_is_trained_on():
    made = Rationale(unseen=0.5).generate()
    for families_of in (rationales.THINGS, rationales.MANNERS):
        seen = {families(families_of, made.documents[i])[0] for i in made.train.answer}
        assert seen == set(range(len(families_of)))


def test_withheld_persons_are_withheld_with_all_that_is_told_of_them():
    made = Facts(documents=60, train=120, test=40).generate()
    person = [" ".join(text.split()[:2]) for text in made.documents]
    assert set(Counter(person).values()) == {len(FACTS)}
    withheld = {name for name, unseen in zip(person, made.unseen, strict=True) if unseen}
    assert all((name in withheld) == unseen for name, unseen in zip(person, made.unseen, strict=True))


@pytest.mark.parametrize("task", [Rationale, Facts])
def test_noise_is_an_exact_share_and_stays_among_documents_of_its_kind(task):
    clean, noisy = task(seed=3).generate(), task(seed=3, noise=0.1).generate()
    for part, count in (("train", 120), ("test", 40)):
        a, b = getattr(clean, part), getattr(noisy, part)
        assert a.texts == b.texts
        assert sum(x != y for x, y in zip(a.answer, b.answer, strict=True)) == count
        assert np.array_equal(clean.unseen[list(a.answer)], noisy.unseen[list(b.answer)])


@pytest.mark.parametrize("task", [Rationale, Facts])
def test_the_seed_decides_everything_and_sizes_do_not_change_the_pool(task):
    a, b, c = task().generate(), task().generate(), task(seed=1).generate()
    assert (a.documents, a.train, a.test) == (b.documents, b.train, b.test)
    assert a.documents != c.documents
    fewer = task(train=300).generate()
    assert fewer.documents == a.documents
    assert fewer.test == a.test


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        (Rationale, {"documents": 200}, "documents: got 200; it must be a multiple of 192 up to 1536"),
        (Rationale, {"documents": 1728}, "documents: got 1728"),
        (Facts, {"documents": 100}, "documents: got 100; it must be a multiple of 6 from 12 to 1152"),
        (Facts, {"unseen": 0.6}, "unseen: got 0.6"),
        (Rationale, {"noise": 1.0}, "noise: got 1.0"),
        (Rationale, {"noise": float("nan")}, "noise: got nan"),
        (Rationale, {"train": 1}, "train: got 1"),
        (Facts, {"seed": -1}, "seed"),
    ],
)
def test_sizes_that_cannot_be_are_refused(task, options, message):
    with pytest.raises(ValueError, match=message):
        task(**options)


def test_more_queries_than_there_are_different_ones_are_refused():
    with pytest.raises(ValueError, match=r"train: got 9999 queries for 510 documents; there are at most 5100"):
        Facts(train=9999).generate()
