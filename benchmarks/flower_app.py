"""Flower's side of rounds_vs_flower.py: FedAvg with its own simulation engine. Runs in .venv-peers/flower.

    PYTHONPATH=. python benchmarks/flower_app.py FOLDER   # which holds problem.json, problem.npz; receives flower.npz

Written as a Flower user would, and as fast as its engine allows: Message API, one actor per core, data and module kept per
process, no evaluation, quiet logs, no telemetry. Of raysys it uses the seeds only, to draw the same batches.
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
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from torch import nn

from raysys.runtime.seeds import Seeds, Stream

FOLDER = "ROUNDS_VS_FLOWER_FOLDER"
torch.set_num_threads(1)


class Problem(NamedTuple):
    """What a process keeps: the examples, which of them belong to which client, and the module that clients take turns in."""

    values: dict[str, Any]
    x: torch.Tensor
    y: torch.Tensor
    parts: list[np.ndarray]
    net: nn.Module
    start: list[torch.Tensor]


@lru_cache(maxsize=1)
def problem() -> Problem:
    """Read once per process."""
    folder = Path(os.environ[FOLDER])
    values = json.loads((folder / "problem.json").read_text())
    with np.load(folder / "problem.npz") as arrays:
        x, y = torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y"])
        parts = np.split(arrays["indices"], arrays["cuts"])
        start = torch.from_numpy(arrays["start"])
    features = x[0].numel()
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(features, values["hidden"]), nn.ReLU(), nn.Linear(values["hidden"], values["classes"])
    )
    shapes = [p.shape for p in net.parameters()]
    pieces = torch.split(start, [s.numel() for s in shapes])
    return Problem(values, x, y, parts, net, [p.view(s) for p, s in zip(pieces, shapes, strict=True)])


client = ClientApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    """Local steps of SGD from the server's model on the client's own examples."""
    p = problem()
    node, t = int(context.node_config["partition-id"]), int(message.content["config"]["server-round"]) - 1
    p.net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    optimiser = torch.optim.SGD(p.net.parameters(), lr=p.values["local_lr"], weight_decay=p.values["l2"])
    mine, seeds = p.parts[node], Seeds(p.values["seed"])
    for step in range(p.values["local_steps"]):
        draw = seeds.integers(Stream.BATCH, node, t + (step << 40), p.values["batch"], len(mine))[0]
        rows = torch.from_numpy(mine[draw])
        optimiser.zero_grad()
        nn.functional.cross_entropy(p.net(p.x[rows]), p.y[rows]).backward()
        optimiser.step()
    seen = p.values["batch"] * p.values["local_steps"]
    content = {"arrays": ArrayRecord(p.net.state_dict()), "metrics": MetricRecord({"num-examples": seen})}
    return Message(RecordDict(content), reply_to=message)


class Complete(FedAvg):
    """FedAvg that insists on every client's answer: by default a client that failed is left out without a word."""

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        good = sum(not reply.has_error() for reply in replies)
        if good != problem().values["workers"]:
            raise RuntimeError(f"round {server_round}: {good} of {problem().values['workers']} clients answered")
        return super().aggregate_train(server_round, replies)


class Server:
    """The server's app; notes when each round ended and keeps its model, which costs no copy."""

    def __init__(self) -> None:
        self.stamps: list[float] = []
        self.models: list[ArrayRecord] = []
        self.app = ServerApp()
        self.app.main()(self.main)

    def main(self, grid: Grid, context: Context) -> None:
        p = problem()
        with torch.no_grad():
            for parameter, value in zip(p.net.parameters(), p.start, strict=True):
                parameter.copy_(value)
        n = p.values["workers"]
        # All nodes must be known before the first round samples them; two are enough by default.
        strategy = Complete(fraction_evaluate=0.0, min_train_nodes=n, min_available_nodes=n)
        first = ArrayRecord(p.net.state_dict())
        strategy.start(grid, first, p.values["peer_rounds"], train_config=ConfigRecord(), evaluate_fn=self.note)

    def note(self, round: int, arrays: ArrayRecord) -> None:
        """Called before the first round and after each."""
        self.stamps.append(time.monotonic())
        self.models.append(arrays)


def main(folder: Path) -> None:
    """Run the simulation and save the rounds' times and models."""
    import flower_app
    from flwr.simulation import run_simulation

    os.environ[FOLDER] = str(folder.resolve())
    logging.getLogger("flwr").setLevel(logging.ERROR)
    values = problem().values
    cores = len(os.sched_getaffinity(0))
    server = Server()
    run_simulation(
        server.app,
        flower_app.client,
        num_supernodes=values["workers"],
        backend_config={
            "client_resources": {"num_cpus": values["peer_cpus"], "num_gpus": 0.0},
            "init_args": {"num_cpus": cores, "address": "local", "log_to_driver": False, "logging_level": 40},
        },
    )
    flat = [np.concatenate([a.ravel() for a in arrays.to_numpy_ndarrays()]) for arrays in server.models]
    np.savez(folder / "flower.npz", stamps=server.stamps, models=np.stack(flat))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
