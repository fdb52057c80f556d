"""Settings worth a name: functions that return the values which differ from the defaults."""

from __future__ import annotations

from typing import Any

Values = dict[str, Any]


def paper() -> Values:
    """The paper's schedule (spec 2.3): all layers, R = 150, K = 20, batch 32. Give --model roberta-large and --data glue/NAME."""
    values: Values = {"rounds": 150, "steps": 20, "batch": 32, "layers": 0, "max_length": 128, "partition": "skew"}
    return values | {"lr": 5e-4, "evaluate_every": 10, "topology": "erdos_renyi(p=0.02)"}


def sparse() -> Values:
    """Peers meet rarely: on average less than one link a round."""
    return {"topology": "erdos_renyi(p=0.02)", "rounds": 60}


def matching() -> Values:
    """ADF-LoRA's setting: pairs meet with probability 0.1 and average, T = 5."""
    return {"topology": "matching(p=0.1)", "method": "adf", "interval": 5}


def regression() -> Values:
    """The low-rank matrix problem with a known optimum: no model, no data."""
    values: Values = {"problem": "regression", "optimizer": "sgd", "lr": 0.01, "steps": 20, "rounds": 150}
    return values | {"topology": "erdos_renyi(p=0.02)", "evaluate_every": 10}


PRESETS = {f.__name__: f for f in (paper, sparse, matching, regression)}
