"""The unbiased replay buffer: its batches, its clock, and the bias of the alternative."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from raysys.systems.ernie.rl.urb import Buffer, Progress, mean_lengths, simulate, simulate_april

LENGTHS = st.lists(st.integers(1, 9), min_size=24, max_size=24).map(np.array)


def by_ticks(lengths, batch, depth, slots):
    """The definition, one tick at a time: the slots hold the first unfinished queries of the pool, in order of beginning."""
    left, begun, held, t = lengths.copy(), 0, [], 0
    ticks, began, spent = [], np.zeros(len(lengths), int), 0
    iterations = len(lengths) // batch
    while t < iterations:
        due = range(t * batch, (t + 1) * batch)
        if begun >= due.stop and all(left[q] == 0 for q in due):
            ticks.append(spent)
            t, spent = t + 1, 0
            continue
        while len(held) < slots and begun < min(len(lengths), (t + depth) * batch):
            held.append(begun)
            began[begun] = t
            begun += 1
        for q in held:
            left[q] -= 1
        held = [q for q in held if left[q]]
        spent += 1
    return ticks, began.reshape(iterations, batch)


@given(LENGTHS, st.sampled_from([1, 2, 3, 4, 6]), st.integers(1, 4), st.integers(1, 12))
@settings(max_examples=150, deadline=None)
def test_the_schedule_is_the_one_of_the_definition_tick_by_tick(lengths, batch, depth, slots):
    found = simulate(lengths, batch, depth, slots)
    ticks, began = by_ticks(lengths, batch, depth, slots)
    assert found.ticks.tolist() == ticks
    assert found.began.tolist() == began.tolist()


@given(LENGTHS, st.sampled_from([1, 2, 3, 4, 6]), st.integers(1, 4), st.integers(1, 12))
@settings(max_examples=50, deadline=None)
def test_batch_t_is_d_t_whatever_the_depth_and_staleness_is_bounded_by_it(lengths, batch, depth, slots):
    found = simulate(lengths, batch, depth, slots)
    assert found.batches.tolist() == np.arange(24).reshape(-1, batch).tolist()
    stale = np.arange(len(found.began))[:, None] - found.began
    assert (stale >= 0).all()
    assert (stale <= depth - 1).all()


def test_depth_1_is_the_synchronous_schedule_and_depth_saves_time_at_the_price_of_age():
    """The numbers of the specification's table: lognormal lengths, BS 64, 128 slots, 40 iterations."""
    lengths = np.maximum(1, np.random.default_rng(0).lognormal(4, 1, 64 * 60).astype(int))
    used = lengths[: 64 * 40]
    found = {depth: simulate(used, 64, depth, 128) for depth in (1, 2, 4, 8)}
    assert found[1].ticks.tolist() == used.reshape(40, 64).max(1).tolist()  # synchronous: the longest of each batch
    assert found[1].staleness == 0
    assert all(one.batches.tobytes() == found[1].batches.tobytes() for one in found.values())
    rates = [found[depth].throughput for depth in (1, 2, 4, 8)]  # .116, .222, .411, .626 queries per tick
    assert rates == sorted(rates)
    assert rates[1] > 1.5 * rates[0]
    ages = [found[depth].staleness for depth in (1, 2, 4, 8)]  # 0, .8, 2.5, 4.8
    assert ages == sorted(ages)
    assert ages[3] < 7

    april = simulate_april(lengths, 64, 128, 40)
    population = float(lengths.mean())
    assert april.throughput > rates[3]  # 1.50: faster
    assert mean_lengths(april, lengths, 5) < 0.7 * population  # 50.0 of 87.5: and biased to short answers
    assert mean_lengths(found[4], lengths, 5) == mean_lengths(found[1], lengths, 5)
    assert abs(mean_lengths(found[4], lengths, 40) / population - 1) < 0.1


def test_a_buffer_goes_on_from_its_plain_state():
    lengths = np.random.default_rng(3).integers(1, 30, 60)

    def answering(left):
        def advance(queries, budget):
            told = []
            for q in queries:
                used = int(left[q] if budget is None else min(left[q], budget))
                left[q] -= used
                told.append(Progress(used, bool(left[q] == 0)))
            return told

        return advance

    left = lengths.copy()
    whole = Buffer(60, 6, 3, 12)
    ticks = [whole.run(answering(left)) for _ in range(10)]
    left = lengths.copy()
    part = Buffer(60, 6, 3, 12)
    first = [part.run(answering(left)) for _ in range(4)]
    again = Buffer(60, 6, 3, 12, iteration=part.iteration, begun=part.begun, held=list(part.held))
    assert first + [again.run(answering(left)) for _ in range(6)] == ticks
    with pytest.raises(IndexError, match="only 10"):
        again.run(answering(left))


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="multiple of the batch"):
        Buffer(10, 4, 1, 4)
    with pytest.raises(ValueError, match="at least 1"):
        Buffer(8, 4, 0, 4)
    with pytest.raises(RuntimeError, match="was to be finished"):
        Buffer(4, 4, 1, 4).run(lambda queries, budget: [Progress(1, False) for _ in queries])
    with pytest.raises(ValueError, match="April needs"):
        simulate_april(np.ones(10, int), 4, 2, 1)
