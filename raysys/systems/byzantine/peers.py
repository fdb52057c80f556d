"""Byz-SGD without a server: every peer steps on its own data and mixes its neighbours' models robustly (spec 2.7).

Shapes: k peers of a block, h honest peers, f Byzantine ones, d parameters; models (h, d).

Notable choices
- Round = local half-step x - lr*m, then one application of the peer rule to the neighbours' half-step models.
- The number b_i of Byzantine neighbours that a peer's rule is told is the true one: an oracle, as in the literature;
  `assumed` replaces it with the same number for everyone. Where peers pull (rpel) it is b-hat, which needs no oracle.
- A Byzantine peer may tell every neighbour something else (`edges`): that is what distinguishes it from a broken server client.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from raysys.aggregation.neighbours import PeerRule
from raysys.attacks import Attack, Threat
from raysys.graph import Graph, metropolis_hastings
from raysys.runtime.seeds import Seeds, Stream
from raysys.systems.byzantine.problems import Problem
from raysys.systems.byzantine.setting import Setting
from raysys.systems.byzantine.workers import State, Workers, participants

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]


Graphs = Callable[[int], Graph]
"""The graph of a round."""


class Peers:
    """A block of honest peers: a model and a momentum each.

    b: how many Byzantine neighbours the rule is told of; None: the true number of each peer, an oracle.
    """

    def __init__(
        self,
        problem: Problem,
        setting: Setting,
        seeds: Seeds,
        nodes: I64,
        graphs: Graphs,
        rule: PeerRule,
        b: int | None,
    ) -> None:
        self.setting, self.seeds, self.nodes, self.graphs, self.rule = setting, seeds, nodes, graphs, rule
        self.b = b
        self.problem = problem
        self.model = np.repeat(problem.init().numpy()[None], len(nodes), 0)
        self.momentum = np.zeros_like(self.model)
        self.started = np.zeros(len(nodes), dtype=bool)
        self.skipped = 0

    def train(self, round: int) -> tuple[I64, F32]:
        """Local half-step; ids (k,) and the models (k, d) that are sent. An absent peer neither steps nor sends."""
        here = np.flatnonzero(participants(self.setting, self.seeds, round)[self.nodes])
        gradient = self.problem.gradients(torch.from_numpy(self.model), self.nodes, round).cpu().numpy()
        beta = np.float32(self.setting.momentum if self.setting.momentum_at == "worker" else 0.0)
        old = np.where(self.started[here, None], self.momentum[here], gradient[here])
        self.momentum[here] = beta * old + (np.float32(1) - beta) * gradient[here]
        self.started[here] = True
        self.model[here] -= np.float32(self.setting.step_size(round)) * self.momentum[here]
        return self.nodes[here], self.model[here]

    def exchange(self, round: int, ids: I64, models: F32, edges: dict[tuple[int, int], F32]) -> list[I64]:
        """Mix: each present peer takes the half-step models of its present neighbours, and what the Byzantine ones among
        them tell it.

        Args:
            ids, models: present honest peers (h',) and their models (h', d), this block's own among them.
            edges: (Byzantine sender, receiver) -> (d,).

        Returns:
            For each node of the block, whose messages it received: none if it was absent.
        """
        graph = self.graphs(round)
        weights = metropolis_hastings(graph)
        received = [np.empty(0, np.int64) for _ in self.nodes]
        row = {int(i): r for r, i in enumerate(ids)}
        mixed = self.model.copy()
        for k, node in enumerate(self.nodes):
            if int(node) not in row:
                continue
            sent = {int(j): models[row[int(j)]] for j in graph.neighbours(int(node)) if int(j) in row}
            sent |= {b: v for (b, i), v in edges.items() if i == node}
            if self.rule.pulls is not None:
                draw = self.seeds.rng(Stream.GRAPH, int(node) + 1, round).permutation(graph.neighbours(int(node)))
                sent = {int(j): sent[int(j)] for j in draw[: self.rule.pulls] if int(j) in sent}
            senders = sorted(sent)
            received[k] = np.array(senders, np.int64)
            b = sum(j >= self.setting.honest for j in senders) if self.b is None else self.b
            finite = [j for j in senders if np.isfinite(sent[j]).all()]
            b = max(b - (len(senders) - len(finite)), 0)
            try:
                self.rule.requires(len(finite), b)
            except ValueError:  # too few arrived for the bound: this peer keeps its half-step model
                self.skipped += 1
                continue
            if finite:
                stack = torch.from_numpy(np.stack([sent[j] for j in finite]))
                own = torch.from_numpy(self.model[k])
                mixed[k] = self.rule.mix(own, stack, weights[node, finite], b).numpy()
        self.model = mixed
        return received

    def statistics(self, round: int) -> State:
        """The block's models (k, d) and exact local losses (k,), for the evaluation."""
        losses, _ = self.problem.full_gradients(torch.from_numpy(self.model), self.nodes)
        return {"models": self.model, "loss": losses.double().numpy()}

    def outcomes(self) -> dict[str, int]:
        """Exchanges left out because too few neighbours sent."""
        return {"skipped": self.skipped}

    def state_dict(self) -> State:
        return {
            "model": self.model,
            "momentum": self.momentum,
            "started": self.started,
            "skipped": np.array(self.skipped),
        }

    def load_state_dict(self, state: State) -> None:
        self.model, self.momentum = state["model"].copy(), state["momentum"].copy()
        self.started, self.skipped = state["started"].astype(bool), int(state["skipped"])


class PeerAdversaries:
    """All Byzantine peers: they see every honest model and choose what to tell each neighbour."""

    def __init__(
        self,
        problem: Problem,
        setting: Setting,
        seeds: Seeds,
        nodes: I64,
        graphs: Graphs,
        attack: Attack,
        rule: PeerRule,
    ) -> None:
        self.setting, self.seeds, self.nodes, self.graphs, self.attack = setting, seeds, nodes, graphs, attack
        self.rule = rule
        self.own = Workers(problem, setting, seeds, nodes)
        self.last: F32 | None = None

    def corrupt(self, round: int, ids: I64, models: F32) -> dict[tuple[int, int], F32]:
        """(sender, receiver) -> vector (d,) for every edge from a Byzantine to a present honest peer.

        Args:
            ids, models: present honest peers (h',) and their half-step models (h', d).
        """
        if not len(self.nodes) or not len(ids):
            return {}
        graph = self.graphs(round)
        # Their honest behaviour: a step from the honest average (on flipped labels if the attack is of that kind).
        centre = models.astype(np.float64).mean(0).astype(np.float32)
        self.own.receive(round, centre)
        _, gradient = self.own.train(round)
        own = centre - np.float32(self.setting.step_size(round)) * gradient
        if self.attack.data_level:
            chosen = {int(b): own[k] for k, b in enumerate(self.nodes)}
            return {(b, int(i)): chosen[b] for i in ids for b in chosen if graph.adjacency[i, b]}
        n, d = self.setting.workers, models.shape[1]
        everyone = np.zeros((n, d), dtype=np.float32)
        everyone[ids], everyone[self.nodes] = models, own
        present = np.zeros(n, dtype=bool)
        present[ids] = present[self.nodes] = True
        weights = metropolis_hastings(graph) * np.outer(present, present)
        threat = Threat(
            n=len(ids) + len(self.nodes),
            f=len(self.nodes),
            round=round,
            rule=self.rule,
            reference=None if self.last is None else torch.from_numpy(self.last),
            own=torch.from_numpy(own),
            rng=self.seeds.rng(Stream.ATTACK, 0, round),
        )
        self.last = centre
        told = self.attack.craft_edges(torch.from_numpy(everyone), weights, self.nodes.tolist(), threat)
        return {(int(b), int(i)): v.numpy() for (b, i), v in told.items()}

    def state_dict(self) -> State:
        state = {f"own.{k}": v for k, v in self.own.state_dict().items()}
        state |= {f"attack.{k}": np.asarray(v) for k, v in self.attack.state_dict().items()}
        return state if self.last is None else state | {"last": self.last}

    def load_state_dict(self, state: State) -> None:
        self.own.load_state_dict({k[4:]: v for k, v in state.items() if k.startswith("own.")})
        self.attack.load_state_dict(
            {k[7:]: torch.from_numpy(v.copy()) for k, v in state.items() if k.startswith("attack.")}
        )
        self.last = state["last"].copy() if "last" in state else None
