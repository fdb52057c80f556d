import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raysys.runtime.seeds import Seeds, Stream


@given(st.integers(0, 2**40), st.sampled_from(list(Stream)), st.integers(-1, 1000), st.permutations(range(6)))
def test_a_node_draws_the_same_numbers_in_any_company(seed, stream, round, order):
    seeds = Seeds(seed)
    together = seeds.bits(stream, np.array(order), round, 5)
    alone = np.concatenate([seeds.bits(stream, i, round, 5) for i in order])
    assert np.array_equal(together, alone)


def test_streams_nodes_rounds_and_seeds_never_share_numbers():
    words = [
        Seeds(s).bits(stream, np.arange(10), r, 10).ravel() for s in range(3) for stream in Stream for r in range(-1, 5)
    ]
    every = np.concatenate(words)
    assert len(np.unique(every)) == len(every)


def test_integers_are_uniform_below_their_bound():
    draws = Seeds(1).integers(Stream.BATCH, np.arange(1000), 0, 70, below=7)
    counts = np.bincount(draws.ravel(), minlength=7)
    assert draws.min() == 0
    assert draws.max() == 6
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 22.5  # chi-square, 6 degrees of freedom, p = 0.001


def test_uniform_numbers_of_neighbouring_nodes_are_uncorrelated():
    u = Seeds(5).uniform(Stream.BATCH, np.arange(200), 3, 2000)
    corr = np.corrcoef(u)
    assert np.abs(corr[~np.eye(200, dtype=bool)]).max() < 0.13  # six standard errors


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_out_of_range_is_refused(seed):
    with pytest.raises(ValueError, match="seed must lie in"):
        Seeds(seed)
