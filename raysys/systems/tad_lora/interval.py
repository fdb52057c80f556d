"""The switching interval by the connectivity of the graph: T* = kappa / sqrt(1 - rho).

Source: specs/tad_lora.md section 2.5: the scaling is the paper's (arXiv 2602.00451), its derivation is reconstructed there.
"""

from __future__ import annotations

import math


def select_interval(rho: float, kappa: float, rounds: int) -> int:
    """The divisor of `rounds` nearest to clip(round(kappa / sqrt(1 - rho)), 1, rounds // 4); of two, the smaller.

    A divisor, so that the last phase is whole; at most a quarter, so that each factor has its turn twice. ValueError for
    rho outside [0, 1], kappa <= 0 or rounds < 1.
    """
    if not 0.0 <= rho <= 1.0 or not 0.0 < kappa < math.inf or rounds < 1:
        raise ValueError(
            f"an interval needs rho in [0, 1], kappa > 0 and rounds >= 1, got rho={rho}, kappa={kappa}, rounds={rounds}"
        )
    most = max(1, rounds // 4)
    target = most if rho == 1.0 else min(max(round(kappa / math.sqrt(1.0 - rho)), 1), most)
    return min((t for t in range(1, most + 1) if rounds % t == 0), key=lambda t: (abs(t - target), t))
