"""Attacks by name."""

from __future__ import annotations

import importlib
import inspect

from raysys.attacks.distance import MinMax, MinSum
from raysys.attacks.mimic import Mimic
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
from raysys.attacks.threat import Attack, CustomAttack
from raysys.graph.spec import parse_spec

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
        return _custom(spec)
    name, options = parse_spec(spec, "an attack")
    if name not in ATTACKS:
        raise ValueError(f"unknown attack {name!r}, the attacks are {', '.join(sorted(ATTACKS))}")
    allowed = [p for p in inspect.signature(ATTACKS[name]).parameters if p not in {"args", "kwargs"}]
    for option in options:
        if option not in allowed:
            raise ValueError(f"attack {name} has no option {option!r}, it has {', '.join(allowed) or 'none'}")
    return ATTACKS[name](**options)


def _custom(spec: str) -> CustomAttack:
    module, _, function = spec.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"attack {spec!r} cannot be imported: {error}") from error
    if not callable(found):
        raise ValueError(f"attack {spec!r} must be a function, got {type(found).__name__}")
    return CustomAttack(found, spec)
