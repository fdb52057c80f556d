"""The ablations of reinforcement learning: each arm is the setting with some values changed, on paired seeds.

The base arm is what the setting says, by default MISC over U-RB. Arms named `noise ...` and `bf16` inject a mismatch between
rollout and training engine, which one engine on one CPU does not have; compare them with each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raysys.systems.ernie.rl.setting import RLSetting

BASE = "base"
NOISE: Mapping[str, Any] = {"mismatch": "router"}
OFF: Mapping[str, Any] = {"objective.correction": "off"}
TOKEN: Mapping[str, Any] = {"objective.ratio": "token", "objective.clip_low": 0.2, "objective.clip_high": 0.2}
ARMS: dict[str, Mapping[str, Any]] = {
    BASE: {},
    "synchronous": {"buffer.depth": 1},
    "depth 4": {"buffer.depth": 4},
    "gspo": {**OFF},
    "gspo icepop": {"objective.level": "sequence"},
    "grpo": {**OFF, **TOKEN},
    "grpo icepop": {**TOKEN},
    "dapo": {**OFF, **TOKEN, "objective.clip_high": 0.28, "objective.average": "token", "objective.dynamic": True},
    "tis": {"objective.correction": "tis", "objective.upper": 2.0},
    "wpsm": {"objective.wpsm_alpha": 1.0},
    "hints": {"hints.initial": 0.6},
    "bf16": {"mismatch": "bf16"},
    "r3": {"replay_routes": True},
    "noise": {**NOISE},
    "noise gspo": {**NOISE, **OFF},
    "noise gspo icepop": {**NOISE, "objective.level": "sequence"},
    "noise tis": {**NOISE, "objective.correction": "tis", "objective.upper": 2.0},
    "noise r3": {**NOISE, "replay_routes": True},
    "noise gspo r3": {**NOISE, **OFF, "replay_routes": True},
}


def arm(name: str, base: RLSetting) -> RLSetting:
    """The setting of an arm.

    Raises:
        ValueError: there is no such arm.
    """
    if name not in ARMS:
        raise ValueError(f"arms: got {name!r}; expected some of {', '.join(ARMS)}")
    return base.with_values(ARMS[name])
