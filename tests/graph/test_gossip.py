import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysys.graph import contraction, gossip, make_process, mix, push_sum, to_csr

SPECS = [
    "ring",
    "complete",
    "erdos_renyi(p=0.3)",
    "matching(p=0.3)",
    "finite_time(k=2)",
    "waypoint(radius=0.4, speed=0.1)",
]


def rng(*key):
    return np.random.default_rng(key)


def make(spec, n):
    return make_process(spec, n, "metropolis_hastings", rng(0))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 14), st.integers(1, 14), st.integers(1, 40), st.floats(0, 1), st.integers(0, 10**6))
def test_mix_is_the_weighted_sum(k, m, d, density, seed):
    draw = rng(seed)
    matrix = draw.random((k, m)) * (draw.random((k, m)) < density)
    rows = draw.normal(size=(m, d)).astype(np.float32)
    assert np.abs(mix(rows, *to_csr(matrix)) - matrix @ rows.astype(np.float64)).max() < 1e-5


def test_mix_is_right_at_the_edges_of_tiles():
    for d in (1, gossip.TILE - 1, gossip.TILE, gossip.TILE + 1, 2 * gossip.TILE + 3):
        rows, matrix = rng(d).normal(size=(7, d)).astype(np.float32), rng(d).random((3, 7))
        assert np.abs(mix(rows, *to_csr(matrix)) - matrix @ rows.astype(np.float64)).max() < 1e-5


# spec 5.4, no. 15
def test_a_receiver_gets_the_same_bits_in_any_block_and_any_cut_of_the_columns():
    rows, matrix = rng(1).normal(size=(20, 9000)).astype(np.float32), rng(2).random((20, 20))
    matrix *= rng(3).random((20, 20)) < 0.4
    whole = mix(rows, *to_csr(matrix))
    for block in (slice(0, 1), slice(5, 17)):
        assert np.array_equal(mix(rows, *to_csr(matrix[block])), whole[block])
    assert np.array_equal(mix(rows[:, 100:5000].copy(), *to_csr(matrix)), whole[:, 100:5000])


# spec 5.4, no. 2
@settings(max_examples=40, deadline=None)
@given(st.sampled_from(SPECS), st.integers(0, 10**6), st.lists(st.booleans(), min_size=12, max_size=12))
def test_gossip_keeps_the_mean_whoever_is_present(spec, seed, present):
    rows = (3 + rng(seed).normal(size=(12, 50))).astype(np.float32)
    process, mixed = make(spec, 12), rows
    for t in range(10):
        mixed = mix(mixed, *to_csr(process.mixing(t, rng(seed, t), np.array(present))))
    assert np.abs(mixed.mean(0, dtype=np.float64) - rows.mean(0, dtype=np.float64)).max() < 1e-6
    assert np.array_equal(mixed[~np.array(present)], rows[~np.array(present)])


def test_equal_rows_stay_as_they_are_to_the_bit():
    rows = np.tile(rng(1).normal(size=300).astype(np.float32), (12, 1))
    for spec in SPECS:
        process = make(spec, 12)
        for t in range(5):
            assert np.array_equal(mix(rows, *to_csr(process.mixing(t, rng(t)))), rows)


# spec 5.4, no. 7
@pytest.mark.parametrize("spec", SPECS)
def test_what_is_only_mixed_decays_by_the_contraction_of_each_round(spec):
    process = make(spec, 10)
    rows = rng(5).normal(size=(10, 2000)).astype(np.float32)

    def disagreement(x):
        x = x.astype(np.float64)
        return ((x - x.mean(0)) ** 2).sum()

    for t in range(20):
        matrix = process.mixing(t, rng(t))
        mixed = mix(rows, *to_csr(matrix))
        assert disagreement(mixed) <= contraction(matrix) * disagreement(rows) * (1 + 1e-5) + 1e-9
        rows = mixed


# spec 5.4, no. 15
def test_a_nan_reaches_those_who_hear_it_and_never_the_other_component():
    matrix = np.zeros((12, 12))
    matrix[:5, :5], matrix[5:, 5:] = make("ring", 5).mixing(0, rng(0)), make("erdos_renyi(p=0.6)", 7).mixing(0, rng(1))
    rows = rng(1).normal(size=(12, 80)).astype(np.float32)
    clean, spoilt = rows, rows.copy()
    spoilt[7, 3] = np.nan
    for _ in range(10):
        clean, spoilt = mix(clean, *to_csr(matrix)), mix(spoilt, *to_csr(matrix))
    assert np.array_equal(clean[:5], spoilt[:5])
    assert np.isnan(spoilt[5:, 3]).any()
    assert np.isfinite(np.delete(spoilt, 3, axis=1)).all()


# spec 5.4, no. 15
@settings(max_examples=20, deadline=None)
@given(st.permutations(list(range(9))))
def test_relabelling_peers_relabels_the_result(order):
    matrix, rows = make("erdos_renyi(p=0.4)", 9).mixing(0, rng(4)), rng(1).normal(size=(9, 30)).astype(np.float32)
    moved = mix(rows[order], *to_csr(matrix[np.ix_(order, order)]))
    assert np.abs(moved - mix(rows, *to_csr(matrix))[order]).max() < 1e-6


# spec 5.4, no. 2
@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(["one_peer_exponential", "one_peer_exponential+dropout(p=0.4)"]),
    st.integers(2, 13),
    st.integers(0, 10**6),
    st.data(),
)
def test_push_sum_keeps_the_mass_and_the_sum_of_mass_times_estimate(spec, n, seed, data):
    process, mass = make(spec, n), np.ones(n)
    z = start = rng(seed).normal(size=(n, 20)).astype(np.float32)
    for t in range(25):
        present = np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n))) if t < 8 else None
        z, mass = push_sum(z, mass, process.mixing(t, rng(seed, t), present))
        assert mass.sum() == pytest.approx(n, abs=1e-12 * n)
        assert np.abs((mass[:, None] * z).sum(0) - start.sum(0, dtype=np.float64)).max() < 2e-5


# spec 5.4, no. 2
def test_push_sum_reaches_the_mean_where_plain_mixing_does_not():
    matrix = np.array([[0.5, 0.2, 0.3], [0.4, 0.7, 0.1], [0.1, 0.1, 0.6]])
    z = plain = start = rng(3).normal(size=(3, 5)).astype(np.float32)
    mass = np.ones(3)
    for _ in range(60):
        z, mass = push_sum(z, mass, matrix)
        plain = mix(plain, *to_csr(matrix))
    assert np.abs(z - start.mean(0)).max() < 1e-5
    assert np.abs(plain - start.mean(0)).max() > 1e-2


# spec 5.4, no. 2
def test_push_sum_reaches_the_mean_though_peers_are_lost_for_a_while():
    process, mass = make("one_peer_exponential", 7), np.ones(7)
    z = start = rng(2).normal(size=(7, 5)).astype(np.float32)
    for t in range(60):
        z, mass = push_sum(z, mass, process.mixing(t, rng(t), np.arange(7) != t % 7 if t < 20 else None))
    assert np.abs(z - start.mean(0)).max() < 1e-5


def test_what_gossip_cannot_mix_is_refused():
    indptr, indices, weights = to_csr(np.eye(2))
    with pytest.raises(ValueError, match=r"float32 rows of shape .* got float64"):
        mix(np.zeros((2, 3)), indptr, indices, weights)
    with pytest.raises(ValueError, match=r"lies in 0\.\.0, got 0 to 1"):
        mix(np.zeros((1, 3), dtype=np.float32), indptr, indices, weights)
    with pytest.raises(ValueError, match=r"some mass at every receiver, got 0\.0 at 1"):
        push_sum(np.zeros((2, 3), dtype=np.float32), np.ones(2), np.array([[1.0, 1.0], [0.0, 0.0]]))
