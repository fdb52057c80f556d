"""Attacks by name."""

from __future__ import annotations

from raysys.aggregation.registry import checked, parse_item
from raysys.aggregation.user import load
from raysys.attacks.distance import MinMax, MinSum
from raysys.attacks.mimic import Mimic
from raysys.attacks.peers import Dissensus, Equivocation, Spectral
from raysys.attacks.response import BestResponse, OptAlie, OptIpm
from raysys.attacks.simple import (
    Alie,
    FallOfEmpires,
    Gaussian,
    InnerProduct,
    LabelFlip,
    MaxBias,
    NoAttack,
    NonFinite,
    SignFlip,
)
from raysys.attacks.structured import Hidden, Mirror, Rop
from raysys.attacks.threat import Attack, CustomAttack

ATTACKS: dict[str, type[Attack]] = {
    attack.name: attack
    for attack in (
        NoAttack,
        SignFlip,
        InnerProduct,
        FallOfEmpires,
        Alie,
        MinMax,
        MinSum,
        Mimic,
        LabelFlip,
        Gaussian,
        NonFinite,
        MaxBias,
        OptAlie,
        OptIpm,
        BestResponse,
        Hidden,
        Mirror,
        Rop,
        Dissensus,
        Spectral,
        Equivocation,
    )
}


def make_attack(spec: str, n: int, f: int) -> Attack:
    """The attack `spec` names for f Byzantine nodes among n: `name`, `name(key=value, ...)` or `module:function`.

    A user's function takes (honest (h, d) tensor, threat) and returns (f, d), or (d,) for all alike. ValueError for an
    unknown name or option, or f outside 0..n.
    """
    if not 0 <= f <= n:
        raise ValueError(f"an attack needs 0 <= f <= n, got n={n}, f={f}")
    if ":" in spec:
        return CustomAttack(load(spec), spec)
    name, options = parse_item(spec)
    if name not in ATTACKS:
        raise ValueError(f"unknown attack {name!r}, the attacks are {', '.join(sorted(ATTACKS))}")
    return ATTACKS[name](**checked(f"attack {name}", ATTACKS[name], options))
