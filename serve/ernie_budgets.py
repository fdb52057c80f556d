"""Sub-models by name, and what they cost: parameters, operations, measured time."""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Mapping
from typing import cast

import numpy as np
import torch
from pydantic import Field
from torch import nn

from raysys.runtime.config import Config
from raysys.runtime.storage import Storage
from raysys.systems.ernie.artifact import FOLDER, Bundle
from raysys.systems.ernie.cut import cost
from raysys.systems.ernie.elastic import SubModel
from raysys.systems.ernie.flow import Flow
from raysys.systems.ernie.setting import ModelSetting
from raysys.systems.ernie.stream import Sample, Special, Text
from serve.ernie_models import Budget

CONTEXT = 128
"""Tokens of context at which operations are counted."""


class BudgetConfig(Config):
    """A sub-model. All experts stay; how many of them a token uses is what costs."""

    depth: float = Field(1.0, ge=0, le=1)
    """Part of the layers that may be passed over (all but the first, and those that predict audio codes) that is kept."""
    active: float = Field(1.0, gt=0, le=1)
    """Part of a token's experts that is used, rounded up."""

    def sub(self, setting: ModelSetting, levels: int) -> SubModel:
        """The view; layers that are kept lie evenly."""
        middle = range(1, setting.layers - levels)
        count = round(self.depth * len(middle))
        kept = [middle[i * len(middle) // count] for i in range(count)]
        layers = (0, *kept, *range(max(1, setting.layers - levels), setting.layers))
        return SubModel(layers, math.ceil(self.active * setting.active))


def name_of(run: str) -> str:
    """The run's name, and a fingerprint of its artifact."""
    described = Storage(run).read_bytes(f"{FOLDER}/ernie.json")
    return f"{run.rstrip('/').rpartition('/')[2]}@{hashlib.sha256(described).hexdigest()[:12]}"


@torch.no_grad()
def calibrate(bundle: Bundle, subs: Mapping[str, SubModel | None], steps: int = 5, rounds: int = 8) -> dict[str, float]:
    """Milliseconds of a text token of each sub-model: the lower quartile of steps of a row alone, sub-models in turns, so
    that what else the machine does is the same to all and counts little."""
    model, found = bundle.model, {name: list[float]() for name in subs}
    prompt = Sample("lm", (Text(np.full(8, len(Special), np.int64), False),))
    for _ in range(rounds):
        for name, sub in subs.items():
            flow = Flow(model, [prompt], Special.SEP, steps + 2, sub)
            flow.start()
            token = torch.full((1,), len(Special))
            flow.text(token)
            for _ in range(steps):
                began = time.perf_counter()
                flow.text(token)
                found[name].append(1e3 * (time.perf_counter() - began))
    return {name: float(np.percentile(taken, 25)) for name, taken in found.items()}


def told(bundle: Bundle, sub: SubModel, ms: float) -> Budget:
    """What is told of a budget."""
    costs = cost(bundle.model, sub, CONTEXT)
    return Budget(
        layers=list(sub.layers), active=sub.active, parameters=costs.total, active_parameters=costs.active,
        mflops=round(costs.flops / 1e6, 3), token_ms=round(ms, 3),
    )  # fmt: skip


def weights_bytes(bundle: Bundle) -> int:
    """Bytes of all weights, each storage counted once."""
    storages = {}
    for module in (bundle.model, bundle.visual, bundle.audio):
        for tensor in (*cast(nn.Module, module).parameters(), *module.buffers()):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def resident_bytes() -> int:
    """Resident memory of this process."""
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
