"""The bounds of Byzantine-robust SGD: what the error floors must be. Each formula is one function.

Notation: n workers, f Byzantine, h = n - f honest, kappa the robustness constant of the rule, (G, B) the honest
dissimilarity (1/h) sum ||grad L_i - grad L||^2 <= G^2 + B^2 ||grad L||^2, sigma^2 the gradient noise of one worker,
alpha = 1 - beta the momentum weight, L smoothness, mu the PL constant, gamma the step.

Source: specs/byzantine.md sections 2.1, 2.3 and 2.4 (re-derivation of 2604.10179 with constant 1); measured against
runs in floors.py. A floor is a value of ||grad L_H||^2 unless its name says loss.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def breakdown(B: float) -> float:
    """The fraction f/n at which no algorithm has a finite floor: 1 / (2 + B^2). Source: Allouah+ 2023 (2309.13591)."""
    return 1.0 / (2.0 + B**2)


def kappa_limit(n: int, f: int) -> float:
    """f / (n - 2f): the smallest kappa any rule can have, inf from n = 2f on."""
    return f / (n - 2 * f) if n > 2 * f else math.inf


def misspecified_kappa(n: int, f: int, f_hat: int) -> float:
    """kappa of the trimmed mean set to f_hat when f are Byzantine: f_hat / (n - f - f_hat), inf if f_hat < f."""
    if f_hat < f or 2 * f_hat >= n:
        return math.inf
    return f_hat / (n - f - f_hat)


def lower_bound(n: int, f: int, G: float, B: float) -> float:
    """f G^2 / (n - (2 + B^2) f): no algorithm, whatever its rule and time, stays below in both worlds.

    0 for f = 0; inf at and beyond breakdown (even for G = 0, see lower_bound.breakdown_instance).
    """
    _check(n, f, G, B)
    if f == 0:
        return 0.0
    room = n - (2.0 + B**2) * f
    return f * G**2 / room if room > 1e-12 * n else math.inf


def loss_lower_bound(n: int, f: int, G: float, B: float, mu: float) -> float:
    """f G^2 / (2 mu (n - (2 + B^2) f)), the same bound for L_H - L* under PL."""
    return lower_bound(n, f, G, B) / (2.0 * mu)


def momentum_factor(alpha: float) -> float:
    """alpha / (2 - alpha) = (1 - beta) / (1 + beta): what local momentum leaves of the noise floor."""
    if not 0.0 < alpha <= 1.0:
        raise ValueError(f"alpha must lie in (0, 1], got {alpha}")
    return alpha / (2.0 - alpha)


def floor_without_momentum(kappa: float, G: float, B: float, sigma: float = 0.0, h: int | None = None) -> float:
    """kappa (G^2 + (1 - 1/h) sigma^2) / (1 - kappa B^2) for steps to zero; inf when kappa B^2 >= 1.

    h=None leaves out the factor 1 - 1/h, which needs noise that is independent between workers.
    """
    share = 1.0 if h is None else 1.0 - 1.0 / h
    return _over(kappa * (G**2 + share * sigma**2) if kappa > 0 else 0.0, kappa, B)


def floor_with_momentum(kappa: float, G: float, B: float, sigma: float, alpha: float, h: int | None = None) -> float:
    """kappa (G + sigma sqrt(alpha / (2 - alpha)))^2 / (1 - kappa B^2), gamma L << alpha; rigorous for B = 0."""
    share = 1.0 if h is None else 1.0 - 1.0 / h
    spread = G + sigma * math.sqrt(share * momentum_factor(alpha))
    return _over(kappa * spread**2 if kappa > 0 else 0.0, kappa, B)


def error_floor(
    rule: Any, n: int, f: int, G: float, B: float, sigma: float = 0.0, alpha: float = 1.0, independent: bool = True
) -> float:
    """The floor of ||grad L_H||^2 that a rule guarantees for small steps; inf when it guarantees none.

    rule: a kappa, or a Rule whose kappa(n, f) is known (ValueError otherwise). alpha < 1: local momentum.
    independent: whether the noise of different workers is independent.
    """
    _check(n, f, G, B)
    kappa = rule_kappa(rule, n, f)
    h = n - f if independent else None
    if alpha == 1.0:
        return floor_without_momentum(kappa, G, B, sigma, h)
    return floor_with_momentum(kappa, G, B, sigma, alpha, h)


def loss_floor(
    rule: Any, n: int, f: int, G: float, B: float, mu: float, sigma: float = 0.0, alpha: float = 1.0
) -> float:
    """error_floor / (2 mu): the floor of L_H - L* under PL."""
    return error_floor(rule, n, f, G, B, sigma, alpha) / (2.0 * mu)


def nonconvex_bound(
    kappa: float, G: float, B: float, sigma: float, h: int, L: float, gamma: float, T: int, gap: float
) -> float:
    """Bound on (1/T) sum_t E ||grad L_H(theta_t)||^2 without momentum; gap = L_H(theta_0) - L*.

    [2 gap / (gamma T) + kappa (1 + 2 L gamma) V + 2 L gamma sigma^2 / h] / (1 - kappa B^2 (1 + 2 L gamma)) with
    V = G^2 + (1 - 1/h) sigma^2; inf when the denominator is not positive. ValueError if gamma > 1/L.
    """
    inflation = _inflation(L, gamma)
    V = G**2 + (1.0 - 1.0 / h) * sigma**2
    return _over(2 * gap / (gamma * T) + kappa * inflation * V + 2 * L * gamma * sigma**2 / h, kappa * inflation, B)


def pl_bound(
    kappa: float, G: float, B: float, sigma: float, h: int, L: float, mu: float, gamma: float, T: int, gap: float
) -> float:
    """Bound on E[L_H(theta_T) - L*] without momentum under PL; gap = L_H(theta_0) - L*.

    (1 - gamma mu r)^T gap + [kappa (1 + 2 L gamma) V + 2 L gamma sigma^2 / h] / (2 mu r), r = 1 - kappa B^2 (1 + 2 L gamma).
    """
    inflation = _inflation(L, gamma)
    V = G**2 + (1.0 - 1.0 / h) * sigma**2
    room = 1.0 - kappa * B**2 * inflation
    if room <= 0:
        return math.inf
    floor = (kappa * inflation * V + 2 * L * gamma * sigma**2 / h) / (2 * mu * room)
    return (1.0 - gamma * mu * room) ** T * gap + floor


def momentum_bias(bias: float, alpha: float, sigma: float, h: int, L: float, gamma: float, update: float) -> float:
    """One round of E ||m_bar - grad L||^2: (1 - alpha) e + L^2 gamma^2 / alpha ||R||^2 + alpha^2 sigma^2 / h."""
    return (1.0 - alpha) * bias + (L * gamma * update) ** 2 / alpha + alpha**2 * sigma**2 / h


def rule_kappa(rule: Any, n: int, f: int) -> float:
    """The number kappa of a rule at (n, f), or the number itself."""
    if isinstance(rule, (int, float)):
        return float(rule)
    kappa = rule.kappa(n, f)
    if kappa is None:
        raise ValueError(f"{rule!r} has no known kappa at n={n}, f={f}; measure one with kappa_search")
    return float(kappa.value)


def rpel_b_hat(n: int, b: int, s: int, T: int, fail: float) -> int:
    """How many of s pulled models may be Byzantine, for all honest peers over T rounds but with probability `fail`.

    The smallest b_hat with (n - b) T P[Hypergeometric(n - 1, b, s) > b_hat] <= fail. Source: El Mrini+ 2025 (2510.08311).
    """
    if not 0 <= s <= n - 1 or not 0 <= b < n:
        raise ValueError(f"a pull needs 0 <= s <= n - 1 and 0 <= b < n, got n={n}, b={b}, s={s}")
    return _tail_bound(n - 1, b, s, (n - b) * T, fail)


def subsampled_f(n: int, f: int, sampled: int, T: int, fail: float) -> int:
    """How many of `sampled` clients drawn without replacement may be Byzantine in any of T rounds but with `fail`.

    The smallest f_hat with T P[Hypergeometric(n, f, sampled) > f_hat] <= fail. Source: Allouah+ 2024 (FedRo).
    """
    if not 0 < sampled <= n or not 0 <= f <= n:
        raise ValueError(f"a sample needs 0 < sampled <= n and 0 <= f <= n, got n={n}, f={f}, sampled={sampled}")
    return _tail_bound(n, f, sampled, T, fail)


def _tail_bound(population: int, bad: int, draws: int, trials: int, fail: float) -> int:
    if not 0.0 < fail < 1.0 or trials < 1:
        raise ValueError(f"the tail needs 0 < fail < 1 and at least one trial, got fail={fail}, trials={trials}")
    counts = np.arange(min(bad, draws) + 1)
    from scipy.stats import hypergeom  # scipy.stats takes a second to import, in every host; only sampling needs it

    return int(counts[trials * hypergeom.sf(counts, population, bad, draws) <= fail][0])


def _over(numerator: float, kappa: float, B: float) -> float:
    room = 1.0 - kappa * B**2 if B > 0 else 1.0
    return numerator / room if room > 1e-12 else math.inf


def _inflation(L: float, gamma: float) -> float:
    if not 0.0 < gamma <= 1.0 / L:
        raise ValueError(f"the bound needs a step 0 < gamma <= 1/L = {1.0 / L:.6g}, got {gamma}")
    return 1.0 + 2.0 * L * gamma


def _check(n: int, f: int, G: float, B: float) -> None:
    if not 0 <= 2 * f < n:
        raise ValueError(f"the bounds need 0 <= 2f < n, got n={n}, f={f}")
    if G < 0 or B < 0:
        raise ValueError(f"dissimilarity needs G >= 0 and B >= 0, got G={G}, B={B}")
