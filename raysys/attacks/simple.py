"""Attacks that need neither the rule nor the distances: one formula each.

Attacks exist only in simulation. Notation: mu, s the honest mean and population standard deviation per coordinate.
"""

from __future__ import annotations

import torch
from scipy.special import ndtri
from torch import Tensor

from raysys.attacks.threat import Attack, Threat


class NoAttack(Attack):
    """The Byzantine nodes behave: they send their own honest vectors, or repeat honest rows when those are not given."""

    name = "none"
    uses_own = True

    def rows(self, honest: Tensor, threat: Threat) -> Tensor:
        if threat.own is not None:
            return threat.own.to(honest.dtype)
        return honest[torch.arange(threat.f, device=honest.device) % len(honest)]


class SignFlip(Attack):
    """-scale mu; with own=True each Byzantine node flips its own honest vector instead."""

    name = "sign_flip"

    def __init__(self, scale: float = 1.0, own: bool = False) -> None:
        self.scale, self.own = scale, own

    @property
    def uses_own(self) -> bool:
        return self.own

    def rows(self, honest: Tensor, threat: Threat) -> Tensor:
        if not self.own:
            return -self.scale * honest.mean(0)
        return -self.scale * _own(self, threat).to(honest.dtype)


class InnerProduct(Attack):
    """IPM: -epsilon mu. Source: Xie+ 2020 (1903.03936); stealthy at epsilon 0.1 and 0.5."""

    name = "ipm"

    def __init__(self, epsilon: float = 0.5) -> None:
        self.epsilon = epsilon

    def rows(self, honest: Tensor, threat: Threat) -> Tensor:
        return -self.epsilon * honest.mean(0)


class FallOfEmpires(InnerProduct):
    """FOE: the inner-product attack at a size that stealth no longer cares about, epsilon = 10."""

    name = "foe"

    def __init__(self, epsilon: float = 10.0) -> None:
        super().__init__(epsilon)


def alie_z_max(n: int, f: int) -> float:
    """The largest z at which ALIE still hides behind honest rows: Phi^-1((n-f-q)/(n-f)), q = floor(n/2+1) - f.

    Source: Baruch+ 2019 (1902.06156), algorithm 3. ValueError unless n > 2f.
    """
    if n <= 2 * f:
        raise ValueError(f"ALIE's z_max needs n > 2f, got n={n}, f={f}")
    supporters = n // 2 + 1 - f
    return float(ndtri((n - f - supporters) / (n - f)))


class Alie(Attack):
    """A Little Is Enough: mu - z s. z defaults to z_max(n, f), and to 1.5 where n > 2f fails (a local neighbourhood).

    Source: Baruch+ 2019. Many papers fix z = 1.5, far above z_max.
    """

    name = "alie"

    def __init__(self, z: float | None = None) -> None:
        self.z = z

    def rows(self, honest: Tensor, threat: Threat) -> Tensor:
        z = self.z
        if z is None:
            z = alie_z_max(threat.n, threat.f) if threat.n > 2 * threat.f else 1.5
        return honest.mean(0) - z * honest.std(0, correction=0)


class Gaussian(Attack):
    """Noise N(centre, sigma^2 I), independent rows; the centre is zero or, with around_mean=True, mu."""

    name = "gaussian"

    def __init__(self, sigma: float = 1.0, around_mean: bool = False) -> None:
        if sigma < 0:
            raise ValueError(f"gaussian needs sigma >= 0, got {sigma}")
        self.sigma, self.around_mean = sigma, around_mean

    def rows(self, honest: Tensor, threat: Threat) -> Tensor:
        noise = self.sigma * torch.from_numpy(threat.rng.standard_normal((threat.f, honest.shape[1]))).to(honest)
        return noise + honest.mean(0) if self.around_mean else noise


class NonFinite(Attack):
    """Rows of NaN, inf, -inf in turn, or of one `value`: a fault more than an attack."""

    name = "non_finite"
    _CYCLE = (float("nan"), float("inf"), float("-inf"))

    def __init__(self, value: float | None = None) -> None:
        self.value = value

    def rows(self, honest: Tensor, threat: Threat) -> Tensor:
        values = [self._CYCLE[k % 3] if self.value is None else float(self.value) for k in range(threat.f)]
        return torch.tensor(values, dtype=honest.dtype, device=honest.device)[:, None].expand(-1, honest.shape[1])


class LabelFlip(Attack):
    """The Byzantine nodes train on labels y -> C - 1 - y and send the result, which the caller gives as threat.own."""

    name = "label_flip"
    data_level = True

    def rows(self, honest: Tensor, threat: Threat) -> Tensor:
        return _own(self, threat).to(honest.dtype)


class MaxBias(Attack):
    """Coordinate by coordinate outside the honest range, on the side against mu.

    Trimmed mean then returns the mean of the n - 2f honest values lowest along mu's sign, the exact worst case for
    that direction. margin: how far outside, in honest ranges. Source: Fang+ 2020 (1911.11815) at full knowledge.
    """

    name = "max_bias"

    def __init__(self, margin: float = 0.1) -> None:
        self.margin = margin

    def rows(self, honest: Tensor, threat: Threat) -> Tensor:
        low, high = honest.amin(0), honest.amax(0)
        out = self.margin * (high - low)
        return torch.where(honest.mean(0) > 0, low - out, high + out)


def _own(attack: Attack, threat: Threat) -> Tensor:
    if threat.own is None:
        raise ValueError(f"{attack.name} needs threat.own, the vectors of the Byzantine nodes themselves, got None")
    if len(threat.own) != threat.f:
        raise ValueError(f"{attack.name} needs {threat.f} rows in threat.own, got {len(threat.own)}")
    return threat.own
