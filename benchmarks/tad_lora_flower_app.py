"""Flower's side of tad_lora_vs_flower.py: FedAvg of peft adapters in its own simulation engine. Runs in .venv-peers/flower.

    PYTHONPATH=. python benchmarks/tad_lora_flower_app.py FOLDER   # which holds problem.json, problem.npz; receives flower.npz

Written after Flower's own template for peft (FlowerTune), and as fast as its engine allows: Message API, one actor per core;
model and tokenised texts are kept per process, where the template loads the model anew in every call; no evaluation, quiet
logs, no telemetry. Of raysys it uses the seeds only, to draw the same batches.
The apps live in an importable module, not in __main__, so that Ray sends them by name with every message.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

import numpy as np
import torch
from cputime import cpu_seconds
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoModel

from raysys.runtime.seeds import Seeds, Stream

FOLDER = "TAD_LORA_VS_FLOWER_FOLDER"
torch.set_num_threads(1)


class Problem(NamedTuple):
    """What a process keeps: texts, which of them belong to which client, and the model that its clients take turns in."""

    values: dict[str, Any]
    texts: dict[str, torch.Tensor]
    y: torch.Tensor
    parts: list[np.ndarray]
    head: torch.Tensor
    model: Any


@lru_cache(maxsize=1)
def problem() -> Problem:
    """Read once per process. The adapter holds the common start."""
    folder = Path(os.environ[FOLDER])
    values = json.loads((folder / "problem.json").read_text())
    with np.load(folder / "problem.npz") as arrays:
        saved = {key: arrays[key] for key in arrays.files}
    texts = {key[6:]: torch.from_numpy(value) for key, value in saved.items() if key.startswith("texts.")}
    start = {key[6:]: torch.from_numpy(value) for key, value in saved.items() if key.startswith("start.")}
    told = {"r": values["rank"], "lora_alpha": values["alpha"], "lora_dropout": 0.0}
    config = LoraConfig(target_modules=["query", "value"], layers_to_transform=values["layers"], **told)
    model = get_peft_model(AutoModel.from_pretrained(values["model"]), config).eval()
    unknown = set(start) ^ set(get_peft_model_state_dict(model))
    if unknown:
        raise ValueError(f"start: adapters are named differently: {', '.join(sorted(unknown))}")
    set_peft_model_state_dict(model, start)
    parts = np.split(saved["indices"], saved["cuts"])
    return Problem(values, texts, torch.from_numpy(saved["y"]), parts, torch.from_numpy(saved["head"]), model)


def loss_of(p: Problem, rows: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of some texts, padded to the longest of them or to a fixed length."""
    made = {key: value[rows] for key, value in p.texts.items()}
    longest = int(made["attention_mask"].sum(1).max())
    width = (p.values["pad_to"] or longest) - made["attention_mask"].shape[1]
    made = {key: torch.nn.functional.pad(value, (0, width)) for key, value in made.items()}  # MiniLM pads with 0
    mask = made["attention_mask"][..., None].float()
    pooled = (p.model(**made).last_hidden_state * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.cross_entropy(pooled @ p.head.T, p.y[rows])


client = ClientApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    """Local steps of AdamW from the server's adapter on the client's own texts."""
    p = problem()
    node, t = int(context.node_config["partition-id"]), int(message.content["config"]["server-round"]) - 1
    set_peft_model_state_dict(p.model, message.content["arrays"].to_torch_state_dict())
    trained = [parameter for parameter in p.model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=p.values["lr"], weight_decay=0.0)
    mine, seeds = p.parts[node], Seeds(p.values["seed"])
    for step in range(p.values["steps"]):
        draw = seeds.integers(Stream.BATCH, node, t + (step << 40), p.values["batch"], len(mine))[0]
        optimiser.zero_grad()
        loss_of(p, torch.from_numpy(mine[draw])).backward()
        optimiser.step()
    seen = p.values["batch"] * p.values["steps"]
    answer = ArrayRecord(get_peft_model_state_dict(p.model))
    return Message(RecordDict({"arrays": answer, "metrics": MetricRecord({"num-examples": seen})}), reply_to=message)


class Complete(FedAvg):
    """FedAvg that insists on every client's answer: by default a client that failed is left out without a word."""

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        replies = list(replies)
        failed = [str(reply.error) for reply in replies if reply.has_error()]
        if failed or len(replies) != problem().values["peers"]:
            raise RuntimeError(
                f"round {server_round}: {len(replies)} answers, {len(failed)} of them errors: {failed[:1]}"
            )
        return super().aggregate_train(server_round, replies)


class Server:
    """The server's app; notes when each round ended, the processor time by then, and its adapter."""

    def __init__(self) -> None:
        self.stamps: list[float] = []
        self.cpu: list[float] = []
        self.adapters: list[ArrayRecord] = []
        self.app = ServerApp()
        self.app.main()(self.main)

    def main(self, grid: Grid, context: Context) -> None:
        p = problem()
        n = p.values["peers"]
        # All nodes must be known before the first round samples them; two are enough by default.
        strategy = Complete(fraction_evaluate=0.0, min_train_nodes=n, min_available_nodes=n)
        first = ArrayRecord(get_peft_model_state_dict(p.model))
        strategy.start(grid, first, p.values["peer_rounds"], train_config=ConfigRecord(), evaluate_fn=self.note)

    def note(self, round: int, arrays: ArrayRecord) -> None:
        """Called before the first round and after each."""
        self.stamps.append(time.monotonic())
        self.cpu.append(cpu_seconds(os.getpid()))
        self.adapters.append(arrays)


def main(folder: Path) -> None:
    """Run the simulation and save the rounds' times and the last adapter."""
    import tad_lora_flower_app as app
    from flwr.simulation import run_simulation

    os.environ[FOLDER] = str(folder.resolve())
    logging.getLogger("flwr").setLevel(logging.ERROR)
    values = json.loads((folder / "problem.json").read_text())
    server = Server()
    run_simulation(
        server.app,
        app.client,
        num_supernodes=values["peers"],
        backend_config={
            "client_resources": {"num_cpus": 1.0, "num_gpus": 0.0},
            "init_args": {
                "num_cpus": len(os.sched_getaffinity(0)), "address": "local", "log_to_driver": False, "logging_level": 40,
            },
        },
    )  # fmt: skip
    last = {f"last.{key}": value.numpy() for key, value in server.adapters[-1].to_torch_state_dict().items()}
    np.savez(folder / "flower.npz", stamps=server.stamps, cpu=server.cpu, **last)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
