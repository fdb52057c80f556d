"""Workers of Byz-SGD: honest ones, stepped together, and the Byzantine ones that collude.

Shapes: k nodes of a block, k' of them in a round, h honest rows, f Byzantine rows, d parameters.

Notable choices
- A block is many nodes in one object: state is (k, d), one batched gradient serves all. It knows nothing of Ray.
- Who takes part in a round is a function of (seed, round), so anybody can work it out and nobody has to ask.
- Arithmetic on states is numpy float32: elementwise, hence identical however the vector is cut or nodes are grouped.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from raysys.aggregation import Rule
from raysys.attacks import Attack, Threat
from raysys.runtime.seeds import Seeds, Stream
from raysys.systems.byzantine.problems import Problem
from raysys.systems.byzantine.setting import Setting

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
State = dict[str, NDArray]


def participants(setting: Setting, seeds: Seeds, round: int) -> NDArray[np.bool_]:
    """Which of the n workers send in this round: a uniform sample, from which honest ones may drop out. Not to be changed."""
    return _present(setting.workers, setting.honest, setting.sample, setting.dropout, seeds.seed, round)


@lru_cache(maxsize=8)
def _present(n: int, honest: int, sample: int | None, dropout: float, seed: int, round: int) -> NDArray[np.bool_]:
    # Kept, because every block of a host asks: 1,250 blocks of 10,000 workers would draw and sort 10,000 numbers each.
    present = np.ones(n, dtype=bool)
    if sample is not None or dropout > 0:
        u = Seeds(seed).uniform(Stream.PARTICIPATION, np.arange(n), round, 2)
        if sample is not None:
            present[np.argsort(u[:, 0], kind="stable")[sample:]] = False
        present[:honest] &= u[:honest, 1] >= dropout
    present.setflags(write=False)
    return present


class Workers:
    """A block of honest workers with local momentum (spec 2.2)."""

    def __init__(self, problem: Problem, setting: Setting, seeds: Seeds, nodes: I64) -> None:
        self.problem, self.setting, self.seeds, self.nodes = problem, setting, seeds, nodes
        self.model: F32 = problem.init().numpy()
        self.momentum = np.zeros((len(nodes), problem.dimension), dtype=np.float32)
        self.started = np.zeros(len(nodes), dtype=bool)

    def train(self, round: int) -> tuple[I64, F32]:
        """Ids (k',) and messages (k', d) of the block's participants: momenta of (pseudo-)gradients."""
        nodes = self.present(round)
        here = np.searchsorted(self.nodes, nodes)
        if not len(nodes):
            return nodes, np.empty((0, self.problem.dimension), np.float32)
        gradient = self._pseudo_gradient(nodes, round)
        if self.setting.momentum_at != "worker":
            return nodes, gradient
        beta = np.float32(self.setting.momentum)
        if len(here) == len(self.nodes) and self.started.all():
            momentum = beta * self.momentum  # the usual case: the same sum, on whole arrays
            momentum += (np.float32(1) - beta) * gradient
            self.momentum = momentum
            return nodes, momentum
        # m_i starts at its first gradient: a start at zero would bias the first 1/alpha rounds (spec 8).
        old = np.where(self.started[here, None], self.momentum[here], gradient)
        momentum = beta * old + (np.float32(1) - beta) * gradient
        self.momentum = self.momentum.copy()  # the array of the last round may still be somebody's message
        self.momentum[here] = momentum
        self.started[here] = True
        return nodes, momentum

    def present(self, round: int) -> I64:
        """Ids (k',) of the block's nodes that take part in a round."""
        return self.nodes[participants(self.setting, self.seeds, round)[self.nodes]]

    def _pseudo_gradient(self, nodes: I64, round: int) -> F32:
        theta = torch.from_numpy(self.model)
        steps = self.setting.local_steps
        if steps == 1:
            return self.problem.gradients(theta, nodes, round).cpu().numpy()
        local = theta.expand(len(nodes), -1).clone()
        for step in range(steps):
            local -= self.setting.local_lr * self.problem.gradients(local, nodes, round, step).cpu()
        return ((theta - local) / (self.setting.local_lr * steps)).numpy()

    def receive(self, round: int, model: F32) -> None:
        """Take the server's model (d,) for the next round."""
        self.model = model

    def statistics(self, round: int) -> State:
        """Sums over the block from which the server works out |grad L_H|^2, the dissimilarity and the noise.

        Keys: gradient (d,), square (sum of |grad L_i|^2), loss (k,), noise (sum of |g_i - grad L_i|^2), count.
        """
        theta = torch.from_numpy(self.model)
        losses, exact = self.problem.full_gradients(theta, self.nodes)
        exact = exact.double().cpu()
        noisy = self.problem.gradients(theta, self.nodes, round).double().cpu()
        return {
            "gradient": exact.sum(0).numpy(),
            "square": exact.square().sum().numpy(),
            "noise": (noisy - exact).square().sum().numpy(),
            "loss": losses.double().cpu().numpy(),
            "count": np.array(len(self.nodes)),
        }

    def state_dict(self) -> State:
        return {"model": self.model, "momentum": self.momentum, "started": self.started}

    def load_state_dict(self, state: State) -> None:
        self.model, self.momentum = state["model"].copy(), state["momentum"].copy()
        self.started = state["started"].astype(bool)


class Adversaries:
    """All Byzantine workers of a run: omniscient, colluding, simulated (they see what the threat model lets them see)."""

    def __init__(
        self, problem: Problem, setting: Setting, seeds: Seeds, nodes: I64, attack: Attack, rule: Rule
    ) -> None:
        self.setting, self.seeds, self.nodes, self.attack, self.rule = setting, seeds, nodes, attack, rule
        self.own = Workers(problem, setting, seeds, nodes)
        self.reference: F32 | None = None

    def corrupt(self, round: int, senders: I64, honest: F32) -> tuple[I64, F32]:
        """Ids (f',) and messages (f', d) of this round's Byzantine participants, after seeing who of the honest workers sent
        (h',) and what (h', d)."""
        ids, own = self.own.train(round) if self.attack.uses_own else (self.own.present(round), None)
        n = len(honest) + len(ids)
        try:
            self.rule.requires(n, self.rule.f)
        except ValueError:
            # Too few arrived: the server will not aggregate, so there is nothing to attack.
            return ids, np.zeros((len(ids), honest.shape[1]), np.float32) if own is None else own
        threat = Threat(
            n=n,
            f=len(ids),
            round=round,
            rule=self.rule,
            reference=None if self.reference is None else torch.from_numpy(self.reference),
            own=None if own is None else torch.from_numpy(own),
            ids=senders,
            rng=self.seeds.rng(Stream.ATTACK, 0, round),
        )
        return ids, self.attack.craft(torch.from_numpy(honest), threat).numpy()

    def receive(self, round: int, model: F32) -> None:
        """Take the new model. The attacker's guess of the last aggregate is its change divided by the step size: right but
        for server momentum, normalised steps and skipped rounds."""
        self.reference = (self.own.model - model) / np.float32(self.setting.step_size(round))
        self.own.receive(round, model)

    def state_dict(self) -> State:
        state = {f"own.{k}": v for k, v in self.own.state_dict().items()}
        state |= {f"attack.{k}": np.asarray(v) for k, v in self.attack.state_dict().items()}
        if self.reference is not None:
            state["reference"] = self.reference
        return state

    def load_state_dict(self, state: State) -> None:
        self.own.load_state_dict({k[4:]: v for k, v in state.items() if k.startswith("own.")})
        self.attack.load_state_dict(
            {k[7:]: torch.from_numpy(v.copy()) for k, v in state.items() if k.startswith("attack.")}
        )
        self.reference = state["reference"].copy() if "reference" in state else None
