"""What a run leaves for others: every peer's adapter and the consensus one in peft's format, the frozen head, and the labels.

adapters/classifier.json     model, labels, how texts are cut
adapters/head.safetensors    "head" (C, d)
adapters/peer-003/           adapter_model.safetensors, adapter_config.json
adapters/consensus/          the averaged factors, which no peer of a decentralised run holds
"""

from __future__ import annotations

import json

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray

from raysys.nn.lora import export_adapter
from raysys.nn.pretrained import MINILM, find_model
from raysys.runtime.storage import Storage
from raysys.systems.tad_lora.task import Task, texts_of

FOLDER = "adapters"
FORMAT = 1
CONSENSUS = "consensus"


def save_adapters(storage: Storage, task: Task, a: NDArray[np.float32], b: NDArray[np.float32]) -> None:
    """Write the peers' factors A (n, size_a), B (n, size_b) and their mean into the run folder."""
    s = task.setting
    dataset = texts_of(s.data)
    about = {
        "format": FORMAT,
        "model": s.model,
        "labels": list(dataset.labels),
        "max_length": s.max_length,
        "pair": dataset.train.second is not None,
        "precision": s.precision,
    }
    head = {"head": task.head.contiguous()}
    storage.write_bytes(f"{FOLDER}/head.safetensors", safetensors.torch.save(head), durable=False)
    base = find_model(s.model) if s.model == MINILM else s.model
    means = [factor.astype(np.float64).mean(0).astype(np.float32) for factor in (a, b)]
    named = {f"peer-{i:03d}": (a[i], b[i]) for i in range(len(a))} | {CONSENSUS: (means[0], means[1])}
    for name, factors in named.items():
        flat_a, flat_b = (torch.from_numpy(np.ascontiguousarray(factor)) for factor in factors)
        export_adapter(storage, f"{FOLDER}/{name}", task.layout, flat_a, flat_b, base)
    storage.write_bytes(f"{FOLDER}/classifier.json", json.dumps(about, indent=1).encode())
