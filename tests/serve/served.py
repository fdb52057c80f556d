"""Runs of adapters with random factors, whole and broken, for the tests of serve."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import safetensors.torch
import torch

from raysys.nn.body import random_head
from raysys.nn.lora import export_adapter, find_layout
from raysys.nn.pretrained import load_base
from raysys.runtime.storage import Storage

KEY = "a-key-of-thirty-two-characters-0"
LABELS = ["bad", "fair", "good"]
TEXTS = [
    "what a film",
    "it drags, and then it drags some more, until even the popcorn has given up and gone home",
    "fine",
    "the second half makes up for the first, which is more than can be said of the third",
    "I would see it again",
    "no",
]


def write_run(run: Path, names: list[str], rank: int = 4, layers: int = 2, pair: bool = False) -> Path:
    """An artifact as a job writes it, with random factors that change predictions visibly."""
    base = load_base()
    layout = find_layout(base.model, (), layers, rank, 2.0 * rank)
    storage, generator = Storage(run).join("adapters"), torch.Generator().manual_seed(1)
    for name in names:
        a, _ = layout.init(generator)
        export_adapter(storage, name, layout, a, 0.3 * torch.randn(layout.size_b, generator=generator), "minilm")
    told = {"format": 1, "model": "minilm", "labels": LABELS, "max_length": 48, "pair": pair}
    storage.write_bytes("classifier.json", json.dumps(told).encode())
    head = random_head(len(LABELS), base.width, generator, std=0.1)
    storage.write_bytes("head.safetensors", safetensors.torch.save({"head": head}))
    return run


def damage(run: Path) -> None:
    """Add adapters that cannot be served: cut short, of another rank, without weights."""
    adapters = run / "adapters"
    shutil.copytree(adapters / "peer-000", adapters / "peer-cut")
    weights = adapters / "peer-cut" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    write_run(run.parent / "other", ["peer-wide"], rank=8)
    shutil.copytree(run.parent / "other" / "adapters" / "peer-wide", adapters / "peer-wide")
    (adapters / "peer-empty").mkdir()
    shutil.copy(adapters / "peer-000" / "adapter_config.json", adapters / "peer-empty")
