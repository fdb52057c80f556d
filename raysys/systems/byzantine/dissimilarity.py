"""Problems with a planted (G, B), and estimators of (G, B, sigma) along a trajectory.

Shapes: h honest workers, d parameters, T points of a trajectory, r repeated draws.
Source: specs/byzantine.md sections 2.1, 5 and appendix C.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raysys.systems.byzantine import theory

F64 = NDArray[np.float64]


@dataclass(frozen=True)
class PlantedQuadratics:
    """h quadratics with grad L_i = (1 + B s_i) Q theta + G u_i: dissimilarity G^2 + B^2 ||grad L_H||^2 at every theta.

    s (h,) has mean 0 and mean square 1; u (h, d) has mean 0, mean squared length 1 and is orthogonal to s, so cross
    terms vanish. The honest loss is theta^T Q theta / 2 (smoothness and PL constant are Q's largest and smallest
    eigenvalue). With B > 1 some worker's own loss curves downwards; nothing in the theory minds.
    """

    G: float
    B: float
    Q: F64
    s: F64
    u: F64

    def gradients(self, theta: F64) -> F64:
        """(h, d) the honest gradients at theta (d,)."""
        mean = self.Q @ theta
        return mean + self.B * np.outer(self.s, mean) + self.G * self.u

    def loss(self, theta: F64) -> float:
        """L_H(theta) - L*."""
        return 0.5 * float(theta @ self.Q @ theta)


def planted_quadratics(
    h: int, d: int, G: float, B: float, rng: np.random.Generator, curvature: Sequence[float] = (0.5, 1.0)
) -> PlantedQuadratics:
    """Random quadratics with exactly this dissimilarity, eigenvalues of Q spread evenly over `curvature` (low, high).

    ValueError unless h >= 3 (two orthogonal mean-free directions among workers) and 0 < low <= high.
    """
    if h < 3 or d < 1:
        raise ValueError(f"planted quadratics need h >= 3 workers and d >= 1 parameters, got h={h}, d={d}")
    low, high = curvature
    if not 0 < low <= high:
        raise ValueError(f"curvature needs 0 < low <= high, got {low}, {high}")
    if G < 0 or B < 0:
        raise ValueError(f"dissimilarity needs G >= 0 and B >= 0, got G={G}, B={B}")
    frame = np.linalg.qr(rng.standard_normal((d, d)))[0]
    Q = (frame * np.linspace(low, high, d)) @ frame.T
    s = rng.standard_normal(h)
    s -= s.mean()
    s /= math.sqrt((s**2).mean())
    u = rng.standard_normal((h, d))
    u -= u.mean(0)
    u -= np.outer(s, s @ u) / h
    u /= math.sqrt((u**2).sum(1).mean())
    return PlantedQuadratics(G, B, (Q + Q.T) / 2, s, u)


def dissimilarity(gradients: F64) -> tuple[float, float]:
    """(1/h) sum ||g_i - g||^2 and ||g||^2 of honest full gradients (h, d)."""
    mean = gradients.mean(0)
    return float(((gradients - mean) ** 2).sum(1).mean()), float(mean @ mean)


@dataclass(frozen=True)
class DissimilarityFit:
    """G, B fitted over squared gradients in [low, high]; (G, B) is not identifiable from one point.

    envelope: the smallest G that with this B covers every point, G at least.
    """

    G: float
    B: float
    envelope: float
    low: float
    high: float
    residual: float


def fit_dissimilarity(spread: F64, squared_gradient: F64) -> DissimilarityFit:
    """Non-negative least squares of the dissimilarity (T,) on ||grad L_H||^2 (T,): intercept G^2, slope B^2.

    residual: root mean square, relative to the mean dissimilarity. ValueError for fewer than two points.
    """
    spread, squares = np.asarray(spread, dtype=np.float64), np.asarray(squared_gradient, dtype=np.float64)
    if spread.shape != squares.shape or spread.ndim != 1 or len(spread) < 2:
        raise ValueError(
            f"a fit needs two equally long series of at least two points, got {spread.shape}, {squares.shape}"
        )
    from scipy.optimize import nnls  # half a second of import that hosts can do without

    scale = float(squares.max()) or 1.0
    (intercept, slope), misfit = nnls(np.stack([np.ones_like(squares), squares / scale], axis=1), spread)
    slope /= scale
    envelope = math.sqrt(max(float((spread - slope * squares).max()), 0.0))
    residual = misfit / math.sqrt(len(spread)) / max(float(spread.mean()), 1e-300)
    return DissimilarityFit(
        math.sqrt(intercept), math.sqrt(slope), envelope, float(squares.min()), float(squares.max()), residual
    )


def smallest_G(spread: F64, squared_gradient: F64, B: float) -> float:
    """The least G for which (G, B)-dissimilarity holds at every point, for a given B."""
    room = np.asarray(spread, dtype=np.float64) - B**2 * np.asarray(squared_gradient, dtype=np.float64)
    return math.sqrt(max(float(room.max()), 0.0))


def fit_noise(gradients: F64) -> float:
    """sigma from repeated stochastic gradients (r, h, d) at one point: root of the mean over workers of the total variance."""
    if gradients.ndim != 3 or len(gradients) < 2:
        raise ValueError(f"the noise needs at least two draws, shape (r, h, d), got {gradients.shape}")
    return math.sqrt(float(gradients.var(0, ddof=1).sum(1).mean()))


def predicted_floor(rule: Any, n: int, f: int, fit: DissimilarityFit, sigma: float, alpha: float = 1.0) -> float:
    """theory.error_floor at the fitted (G, B, sigma): to be printed next to the measured one."""
    return theory.error_floor(rule, n, f, fit.G, fit.B, sigma, alpha)
