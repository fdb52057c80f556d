"""The instances on which the lower bounds are met with equality, in one dimension.

Two worlds look the same to the server: groups A (n - 2f workers), C and C' (f each) send the same gradients in both,
but in world 0 the honest ones are A and C, in world 1 A and C'. Any output errs by at least the floor in one of them.

Shapes: n workers, c independent copies of the instance (columns), theta (c,). Source: specs/byzantine.md section 2.4
and appendix A.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raysys.systems.byzantine import theory

F64 = NDArray[np.float64]


@dataclass(frozen=True)
class TwoWorlds:
    """Workers with losses curvature_i (theta - centre_i)^2 / 2; rows in the order A, C, C'.

    worlds: (2, n) who is honest. floor: the value of ||grad L_H||^2 that the better output still has on average.
    """

    n: int
    f: int
    G: float
    B: float
    curvature: F64
    centre: F64
    worlds: NDArray[np.bool_]
    floor: float

    @property
    def mu(self) -> float:
        """Curvature of the honest loss, its PL and smoothness constant at once."""
        return float(self.curvature[self.worlds[0]].mean())

    @property
    def smoothness(self) -> float:
        """The largest curvature of a worker; steps up to its inverse are stable for every rule."""
        return float(self.curvature.max())

    @property
    def minimiser(self) -> float:
        """theta* of world 0; world 1 has -theta*."""
        honest = self.worlds[0]
        return float((self.curvature * self.centre)[honest].sum() / self.curvature[honest].sum())

    def gradients(self, theta: F64) -> F64:
        """(n, c) what the workers send at theta (c,), the same in both worlds."""
        return self.curvature[:, None] * (theta[None, :] - self.centre[:, None])

    def honest_gradient(self, theta: F64) -> F64:
        """(2, c) gradient of L_H in each world."""
        gradients = self.gradients(theta)
        return np.stack([gradients[honest].mean(0) for honest in self.worlds])

    def dissimilarity(self, theta: F64) -> F64:
        """(2, c) variance of the honest gradients in each world; at most G^2 + B^2 honest_gradient^2."""
        gradients = self.gradients(theta)
        return np.stack([gradients[honest].var(0) for honest in self.worlds])


def lower_bound_instance(n: int, f: int, G: float, B: float) -> TwoWorlds:
    """The instance with dissimilarity exactly (G, B) whose floor is theory.lower_bound(n, f, G, B).

    Curvatures a = 1 for A and K = 1 + B^2 / (1 - p - p B^2), p = f / (n - f), for C and C', which are centred at +-z.
    ValueError for f = 0 and at or beyond the breakdown point f/n = 1 / (2 + B^2).
    """
    floor = theory.lower_bound(n, f, G, B)
    if f == 0 or math.isinf(floor):
        raise ValueError(
            f"the instance needs 0 < f/n < 1/(2 + B^2) = {theory.breakdown(B):.4f}, got n={n}, f={f}, B={B}"
        )
    p = f / (n - f)
    K = 1.0 + B**2 / (1.0 - p - p * B**2)
    mu = (1.0 - p) + p * K
    tilt = (B / (1.0 - p - p * B**2)) ** 2 * p * (1.0 - p) / mu**2  # (K - a)^2 p (1 - p) / (B mu)^2
    z = G * mu * math.sqrt(1.0 - tilt) / (math.sqrt(p * (1.0 - p)) * K)
    return _two_worlds(n, f, G, B, 1.0, K, z, floor)


def breakdown_instance(n: int, f: int, B: float, z: float) -> TwoWorlds:
    """At or beyond breakdown: no offset at all (G = 0), and a floor (f z / (n - f))^2 that grows with z without end.

    Group A has no curvature, so its workers say nothing. ValueError below the breakdown point, where this instance
    would break (0, B)-dissimilarity.
    """
    if not 0 < 2 * f < n or f / n < theory.breakdown(B) * (1.0 - 1e-12):
        raise ValueError(
            f"the instance needs 1/(2 + B^2) = {theory.breakdown(B):.4f} <= f/n < 1/2, got n={n}, f={f}, B={B}"
        )
    return _two_worlds(n, f, 0.0, B, 0.0, 1.0, z, (f / (n - f) * z) ** 2)


def _two_worlds(n: int, f: int, G: float, B: float, a: float, K: float, z: float, floor: float) -> TwoWorlds:
    sizes = [n - 2 * f, f, f]
    curvature = np.repeat([a, K, K], sizes)
    centre = np.repeat([0.0, z, -z], sizes)
    group = np.repeat([0, 1, 2], sizes)
    return TwoWorlds(n, f, G, B, curvature, centre, np.stack([group != 2, group != 1]), floor)


@dataclass(frozen=True)
class NoiseInstance:
    """Homogeneous losses theta^2 / 2 with the noise that hides best among Byzantine vectors.

    Every round f of the h honest workers, drawn afresh, have noise +z (1 - p), the others -p z (variance sigma^2, mean
    0 over workers as well); the Byzantine ones send the majority's value minus z. A server without memory cannot tell
    the tails apart: floor sigma^2 f / (n - 2f) exactly. Local momentum can.
    """

    n: int
    f: int
    sigma: float

    def __post_init__(self) -> None:
        if not 0 < 2 * self.f < self.n or self.sigma < 0:
            raise ValueError(f"needs 0 < 2f < n and sigma >= 0, got n={self.n}, f={self.f}, sigma={self.sigma}")

    @property
    def p(self) -> float:
        return self.f / (self.n - self.f)

    @property
    def z(self) -> float:
        return self.sigma / math.sqrt(self.p * (1.0 - self.p))

    @property
    def floor(self) -> float:
        return self.sigma**2 * theory.kappa_limit(self.n, self.f)

    def honest_gradients(self, theta: F64, rng: np.random.Generator) -> F64:
        """(h, c) stochastic gradients at theta (c,), columns independent."""
        h, c = self.n - self.f, len(theta)
        first = np.zeros((h, c))
        first[: self.f] = 1.0
        tail = rng.permuted(first, axis=0)
        return theta + self.z * (tail - self.p)

    def byzantine(self, theta: F64) -> F64:
        """(f, c) the majority's value minus z."""
        return np.tile(theta - self.z * (1.0 + self.p), (self.f, 1))


def noise_instance(n: int, f: int, sigma: float) -> NoiseInstance:
    """The instance with gradient noise sigma whose floor is sigma^2 f / (n - 2f)."""
    return NoiseInstance(n, f, sigma)
