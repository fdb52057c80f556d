"""The algorithm in one process, without Ray: what Tune trials, the attack-by-rule matrix and the theory use.

The same objects, in the same blocks and the same order, as the actors of jobs/byzantine.py run: a test holds the two equal
bit for bit.
"""

from __future__ import annotations

import numpy as np

from raysys.runtime.blocks import blocks
from raysys.systems.byzantine.evaluation import evaluate_peers, evaluate_server
from raysys.systems.byzantine.task import Task
from raysys.systems.byzantine.workers import State


class Simulation:
    """Byz-SGD(M) with a server. `step(t)` is one round, `evaluate(t)` measures after it."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.clients = [task.workers(nodes) for nodes in blocks(task.honest, task.setting.block)]
        self.adversaries = task.adversaries(task.byzantine)
        self.server = task.server()

    def step(self, t: int) -> None:
        sent = [client.train(t) for client in self.clients]
        who, honest = (np.concatenate(each) for each in zip(*sent, strict=True))
        sent.append(self.adversaries.corrupt(t, who, honest))
        ids = np.concatenate([i for i, _ in sent])
        model = self.server.aggregate(t, ids, np.concatenate([rows for _, rows in sent]))
        for client in self.clients:
            client.receive(t, model)
        self.adversaries.receive(t, model)

    def evaluate(self, t: int) -> dict[str, float]:
        parts = [client.statistics(t) for client in self.clients]
        return evaluate_server(self.task, self.server.model, parts)

    def outcomes(self) -> dict[str, int]:
        """Rounds skipped and rows rejected."""
        return self.server.outcomes()

    @property
    def model(self) -> np.ndarray:
        """The server's parameters (d,)."""
        return self.server.model

    def parts(self) -> dict[str, object]:
        """The stateful objects by name, for checkpoints."""
        named: dict[str, object] = {f"clients-{k}": c for k, c in enumerate(self.clients)}
        return named | {"adversaries-0": self.adversaries, "server-0": self.server}


class PeerSimulation:
    """Byz-SGD(M) on a graph of peers."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.peers = [task.peers(nodes) for nodes in blocks(task.honest, task.setting.block)]
        self.adversaries = task.peer_adversaries(task.byzantine)

    def step(self, t: int) -> None:
        sent = [peer.train(t) for peer in self.peers]
        ids = np.concatenate([i for i, _ in sent])
        models = np.concatenate([rows for _, rows in sent])
        edges = self.adversaries.corrupt(t, ids, models)
        for peer in self.peers:
            peer.exchange(t, ids, models, edges)

    def evaluate(self, t: int) -> dict[str, float]:
        parts: list[State] = [peer.statistics(t) for peer in self.peers]
        return evaluate_peers(self.task, parts)

    def outcomes(self) -> dict[str, int]:
        """Exchanges that peers left out because too few neighbours sent."""
        return {"skipped": sum(peer.skipped for peer in self.peers)}

    @property
    def model(self) -> np.ndarray:
        """Average of the honest peers' parameters (d,)."""
        return np.concatenate([p.model for p in self.peers]).astype(np.float64).mean(0).astype(np.float32)

    def parts(self) -> dict[str, object]:
        """The stateful objects by name, for checkpoints."""
        return {f"peers-{k}": p for k, p in enumerate(self.peers)} | {"adversaries-0": self.adversaries}


def simulation(task: Task) -> Simulation | PeerSimulation:
    """The simulation that the task's topology asks for."""
    return Simulation(task) if task.setting.topology == "server" else PeerSimulation(task)
