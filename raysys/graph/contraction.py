"""rho, the contraction of a mixing process: E ||W x - mean||^2 <= rho ||x - mean||^2, the smallest such number.

    rho = lambda_2(E[W^T W]): the largest eigenvalue on the complement of the vector of ones.

Sources: Boyd, Ghosh, Prabhakar & Shah, Randomized gossip algorithms (2006), eq. 17; Koloskova+ 2020 (2003.10422),
assumption 4, whose p is 1 - rho.

Notable choices
- Three ways that check each other: closed forms, averages of draws, a running average of what happened.
- For a period of rounds that are not random the rate is the geometric mean over the period (`contraction_closed_form`), while the
  average of W^T W bounds a round whose place in the period is unknown: the two differ, and finite-time graphs show it.

Shapes: n peers, W (n, n).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raysys.graph.mixing import Matrix
from raysys.graph.process import Process

ROUNDING = 1e-12
"""Singular values, and eigenvalues of averages, below this are rounding and count as zero."""


def contraction(matrix: Matrix) -> float:
    """rho of one matrix: the square of the largest singular value on the complement of the vector of ones."""
    value = float(np.linalg.svd(_centred(matrix), compute_uv=False)[0])
    return value**2 if value > ROUNDING else 0.0


class RunningContraction:
    """rho of the matrices seen so far: lambda_2 of the mean of W^T W.

    The largest eigenvalue of an average of m draws exceeds that of the expectation, by about m^-1/2: .006 for n = 10 and
    4,000 draws of an Erdos-Renyi process.
    """

    def __init__(self, n: int) -> None:
        self.count = 0
        self.total = np.zeros((n, n))

    def add(self, matrix: Matrix) -> None:
        self.count += 1
        self.total += matrix.T @ matrix

    @property
    def value(self) -> float:
        """ValueError before the first matrix."""
        if not self.count:
            raise ValueError("the running contraction has seen no matrix yet")
        value = float(np.linalg.eigvalsh(_centred(self.total / self.count))[-1])
        return value if value > ROUNDING else 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "total": self.total.copy()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count, self.total = int(state["count"]), np.array(state["total"], dtype=np.float64)


def contraction_monte_carlo(process: Process, draws: int, rng: np.random.Generator) -> float:
    """rho of rounds 0..draws-1 of the process, all drawn from one generator: see `RunningContraction` for its bias."""
    running = RunningContraction(process.n)
    for round in range(draws):
        running.add(process.mixing(round, rng))
    return running.value


def contraction_closed_form(process: Process) -> float | None:
    """rho without drawing, where it is known; None elsewhere.

    - A fixed graph, or a period of tau rounds with product Q: ||Q - J||^(2 / tau), the rate a round, 0 for an exact mean.
    - "matching", weight w on a pair, dropout q: 1 - 2 w (1 - w) (1 - q) m / (n - 1), m = n (odd: n - 1) peers matched;
      at w = 1/2 W is a projection and E[W^T W] = E[W].
    - "erdos_renyi" under metropolis_hastings or lazy, dropout included: `_erdos_renyi`.
    """
    n, keep = process.n, 1.0 - process.dropout
    if n == 1:
        return 0.0
    if process.period is not None:
        rng, product = np.random.default_rng(0), np.eye(n)  # no round of a period draws anything
        for round in range(process.period):
            product = process.mixing(round, rng) @ product
        return contraction(product) ** (1.0 / process.period)
    if process.name == "matching" and process.options.get("p") is None:
        w = {"metropolis_hastings": 1 / 2, "max_degree": 1 / 2, "pairwise": 1 / 2, "laplacian": 1 / 3, "lazy": 1 / 4}
        share = w[process.weights]
        return 1.0 - 2.0 * share * (1.0 - share) * keep * (n - n % 2) / (n - 1)
    if process.name == "erdos_renyi" and process.weights in ("metropolis_hastings", "lazy"):
        first, second = _erdos_renyi(n, process.options["p"] * keep)
        return second if process.weights == "metropolis_hastings" else (1.0 + 2.0 * first + second) / 4.0
    return None


def _erdos_renyi(n: int, p: float) -> tuple[float, float]:
    """lambda_2 of E[W] and of E[W^2] for Metropolis-Hastings weights on G(n, p), exactly.

    Peers are exchangeable, so both matrices are a I + b J and moments of two edges suffice: with W_12, and W_13 sharing an
    end, E[(W^2)_11] = E[(1 - sum_j W_1j)^2] + (n - 1) E[W_12^2] = (1 + (n - 1) rho) / n. Given the edges among the peers
    that count, degrees are independent binomials. As p -> 0: rho -> 1 - n p / 2, a lone edge averages its two ends.
    """
    two, three = _binomial(n - 2, p), _binomial(max(n - 3, 0), p)
    degree = np.arange(len(two)) + 1
    inverse = 1.0 / (1.0 + np.maximum.outer(degree, degree))
    mean = p * two @ inverse @ two
    square = p * two @ inverse**2 @ two
    product = 0.0
    if n > 2:
        own = np.arange(len(three)) + 2  # degree of the shared end
        for edge, chance in ((0, 1.0 - p), (1, p)):  # whether the outer ends are neighbours too
            other = np.arange(len(three)) + 1 + edge
            given = (1.0 / (1.0 + np.maximum.outer(own, other)) @ three) ** 2
            product += p * p * chance * float(three @ given)
    diagonal = 1.0 - 2.0 * (n - 1) * mean + (n - 1) * square + (n - 1) * (n - 2) * product + (n - 1) * square
    return float(1.0 - n * mean), float((n * diagonal - 1.0) / (n - 1))


def _binomial(n: int, p: float) -> NDArray[np.float64]:
    """(n + 1,) probabilities of 0..n successes."""
    if p in (0.0, 1.0):
        return np.eye(n + 1)[n if p else 0]
    log = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(n + 1)]
    k = np.arange(n + 1)
    return np.asarray(np.exp(np.array(log) + k * math.log(p) + (n - k) * math.log1p(-p)))


def _centred(matrix: Matrix) -> Matrix:
    """(I - J) M (I - J)."""
    less = matrix - matrix.mean(0)
    return np.asarray(less - less.mean(1, keepdims=True))
