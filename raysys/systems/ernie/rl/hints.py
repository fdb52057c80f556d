"""AHRL: sparse rewards are met by showing the beginning of a reference trace, less and less of it [spec 2.10, eq. 5].

Notable choices
- A hint is tokens that the answer begins with. They are given, not drawn, so no loss is on them.
- The reference trace of a query is what its environment says (`info["trace"]`): the way to the answer and then the answer. The
  answer's own last token and <eos> are never part of a hint, so there is always something left to be rewarded.
- As printed, a query that the first model never solves (pass 0) keeps its hint for ever. `floor` is the least pass rate that is
  reckoned with (INFERRED); 0 gives the printed equation.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

I64 = NDArray[np.int64]


def hint_share(time: float, passed: float, initial: float, gamma: float, floor: float = 0.0) -> float:
    """p_hint(x, t) = p_init exp(-gamma t max(pass_init(x), floor)) [eq. 5; the floor INFERRED].

    Args:
        time: t, iterations since RL began.
        passed: pass_init(x), pass@k of the model that RL began with.
    """
    return initial * math.exp(-gamma * time * max(passed, floor))


def hint_of(trace: I64, share: float) -> I64:
    """The first floor(share * n) tokens of a trace (n,), at most n - 1."""
    return trace[: min(int(share * len(trace)), max(0, len(trace) - 1))]


def pass_at(rewards: NDArray[np.float32], k: int) -> float:
    """Unbiased pass@k of n >= k samples with c right ones, 1 - C(n-c, k) / C(n, k) (Chen et al. 2021).

    Raises:
        ValueError: there are fewer than k samples.
    """
    n, right = len(rewards), int((rewards >= 1).sum())
    if n < k:
        raise ValueError(f"pass@{k} needs {k} samples or more, got {n}")
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)
