"""AHRL: the annealing of eq. 5, and what of a trace is shown."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from raysys.systems.ernie.rl.hints import hint_of, hint_share, pass_at


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 5), st.floats(0, 100))
def test_the_share_begins_at_p_init_falls_and_stays_for_queries_never_solved(initial, passed, gamma, time):
    assert hint_share(0, passed, initial, gamma) == initial
    assert hint_share(time, 0.0, initial, gamma) == initial  # as printed: never annealed
    assert 0 <= hint_share(time + 1, passed, initial, gamma) <= hint_share(time, passed, initial, gamma) <= initial
    assert hint_share(time, passed, initial, gamma, floor=0.3) == hint_share(time, max(passed, 0.3), initial, gamma)


def test_a_floor_anneals_the_hints_of_queries_never_solved():
    assert hint_share(10, 0.0, 0.8, 0.5, floor=0.2) == pytest.approx(0.8 * np.exp(-1))


def test_a_hint_is_the_beginning_of_the_trace_and_leaves_the_last_token():
    trace = np.array([5, 6, 7, 8])
    assert hint_of(trace, 0.0).tolist() == []
    assert hint_of(trace, 0.5).tolist() == [5, 6]
    assert hint_of(trace, 0.99).tolist() == [5, 6, 7]
    assert hint_of(trace, 1.0).tolist() == [5, 6, 7]
    assert hint_of(trace[:1], 1.0).tolist() == []


def test_pass_at_k_is_the_probability_that_one_of_k_draws_without_replacement_is_right():
    rewards = np.array([1, 0, 0, 0], np.float32)
    assert pass_at(rewards, 1) == 0.25
    assert pass_at(rewards, 2) == 0.5
    assert pass_at(rewards, 4) == 1.0
    assert pass_at(np.zeros(4, np.float32), 2) == 0.0
    with pytest.raises(ValueError, match="pass@5 needs 5"):
        pass_at(rewards, 5)
