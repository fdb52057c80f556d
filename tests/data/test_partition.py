import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysys.data import make_partition
from raysys.data.partition import skew_mixtures

SPECS = ["iid", "dirichlet(0.1)", "dirichlet(100)", "shards(2)", "gamma(0.5)", "gamma(0)", "gamma(1)", "skew"]


@given(
    spec=st.sampled_from(SPECS),
    nodes=st.integers(1, 30),
    total=st.integers(60, 400),
    classes=st.integers(1, 10),
    seed=st.integers(0, 9),
)
@settings(max_examples=150, deadline=None)
def test_every_partition_is_a_disjoint_cover_with_the_minimum_kept(spec, nodes, total, classes, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, total)
    parts = make_partition(spec, labels, nodes, rng).indices
    assert len(parts) == nodes
    assert min(map(len, parts)) >= 2
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(total))


def test_small_alpha_concentrates_classes_and_large_alpha_spreads_them():
    labels = np.repeat(np.arange(10), 200)

    def distinct(alpha):
        part = make_partition(f"dirichlet({alpha})", labels, 10, np.random.default_rng(0))
        share = part.counts(labels, 10) / part.counts(labels, 10).sum(1, keepdims=True)
        return float((share**2).sum(1).mean())  # 1 for one class per node, 0.1 for all classes alike

    assert distinct(0.01) > 0.8
    assert distinct(1000) < 0.12


def test_vanishing_alpha_gives_each_class_to_one_node():
    labels = np.repeat(np.arange(5), 40)
    part = make_partition("dirichlet(1e-300)", labels, 5, np.random.default_rng(1), minimum=0)
    assert ((part.counts(labels, 5) > 0).sum(0) == 1).all()


def test_two_shards_per_node_hold_at_most_three_classes():
    labels = np.repeat(np.arange(10), 100)
    part = make_partition("shards(2)", labels, 20, np.random.default_rng(0))
    assert ((part.counts(labels, 10) > 0).sum(1) <= 3).all()


def test_gamma_one_is_iid_and_gamma_zero_is_sorted():
    labels = np.repeat(np.arange(10), 100)
    sorted_part = make_partition("gamma(0)", labels, 10, np.random.default_rng(0))
    assert ((sorted_part.counts(labels, 10) > 0).sum(1) == 1).all()
    mixed = make_partition("gamma(1)", labels, 10, np.random.default_rng(0))
    assert ((mixed.counts(labels, 10) > 0).sum(1) == 10).all()


def test_natural_partition_never_splits_a_group():
    group = np.repeat(np.arange(7), [30, 20, 10, 9, 8, 7, 6])
    part = make_partition("natural", np.zeros(90, dtype=np.int64), 4, np.random.default_rng(0), group=group)
    homes = [set(group[i]) for i in part.indices]
    assert sum(len(h) for h in homes) == 7


def skewed(totals, nodes, seed=0):
    labels = np.random.default_rng(9).permutation(np.repeat(np.arange(len(totals)), totals))
    part = make_partition("skew", labels, nodes, np.random.default_rng(seed))
    return part.counts(labels, len(totals))


def test_skew_of_two_equal_classes_on_ten_nodes_has_exactly_the_published_counts():
    assert skewed([500, 500], 10).tolist() == [[90, 10]] * 3 + [[10, 90]] * 3 + [[50, 50]] * 4


def test_skew_of_three_classes_on_ten_nodes_has_the_published_mixtures():
    published = [[0.9, 0.05, 0.05]] * 4 + [[0.05, 0.9, 0.05]] * 3 + [[0.05, 0.05, 0.9]] * 3
    np.testing.assert_allclose(skew_mixtures(10, 3), published)
    exact = skewed([390, 305, 305], 10)  # totals that permit nodes of 100
    np.testing.assert_array_equal(exact, np.array(published) * 100)
    equal = skewed([10000] * 3, 10)  # totals that do not: the sizes give way, the mixtures stay
    np.testing.assert_allclose(equal / equal.sum(1, keepdims=True), published, atol=1e-3)
    assert equal.sum(0).tolist() == [10000] * 3


def test_skew_keeps_its_mixtures_for_the_class_totals_of_sst2():
    counts = skewed([3310, 3610], 10)
    np.testing.assert_allclose(counts / counts.sum(1, keepdims=True), skew_mixtures(10, 2), atol=2e-3)


def test_skew_beyond_what_the_totals_permit_still_uses_each_example_once_and_keeps_the_order_of_preference():
    counts = skewed([990, 10], 10)
    assert counts.sum(0).tolist() == [990, 10]
    share = counts[:, 0] / counts.sum(1)
    assert share[:3].min() > share[6:].mean() > share[3:6].mean()


def test_skew_with_more_classes_than_nodes_gives_each_node_a_block_of_classes():
    counts = skewed([50] * 150, 10)
    own = np.array([counts[i, 15 * i : 15 * i + 15].sum() for i in range(10)])
    np.testing.assert_allclose(own / counts.sum(1), 0.9, atol=0.01)
    assert (counts.sum(0) == 50).all()


@pytest.mark.parametrize(("nodes", "classes"), [(1, 5), (2, 2), (3, 2), (4, 1), (7, 2), (7, 3), (100, 6), (3, 3)])
def test_skew_mixtures_are_distributions_for_any_number_of_nodes(nodes, classes):
    mixture = skew_mixtures(nodes, classes)
    assert mixture.shape == (nodes, classes)
    np.testing.assert_allclose(mixture.sum(1), 1)


def test_partition_depends_on_its_seed_alone():
    labels = np.repeat(np.arange(10), 50)
    one, two = (make_partition("dirichlet(0.3)", labels, 8, np.random.default_rng(3)) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(one.indices, two.indices, strict=True))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("dirichlet", "allowed are"),
        ("dirichlet(0)", "positive"),
        ("dirichlet(1e)", "not a number"),
        ("shards(1.5)", "whole number"),
        ("gamma(1.2)", r"\[0, 1\]"),
        ("sorted", "allowed are"),
        ("natural", "needs data with groups"),
    ],
)
def test_a_bad_partition_is_refused_with_its_value(spec, message):
    with pytest.raises(ValueError, match=message):
        make_partition(spec, np.repeat([0, 1], 50), 4, np.random.default_rng(0))


def test_too_many_nodes_are_refused():
    with pytest.raises(ValueError, match="10 examples cannot give each of 6 nodes at least 2"):
        make_partition("iid", np.zeros(10, dtype=np.int64), 6, np.random.default_rng(0))
