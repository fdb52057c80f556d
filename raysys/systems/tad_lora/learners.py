"""Local training of the factors of k peers: in one batch, or one peft model per peer. Both give the same numbers.

Shapes: k peers, b texts per peer and step, K steps; flat factors A (k, size_a), B (k, size_b); C classes, N test texts.

Notable choices
- A peer's batch of step s in round t is a function of (seed, peer, t, s): nothing else decides it.
- The loss of a group is the sum over its peers of each peer's mean cross-entropy, so a peer's gradient is its own.
- Adam works element by element, so one optimizer over the buffers of k peers is k optimizers.
- The frozen factor is not handed to the optimizer at all: weight decay and stale moments cannot touch it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from raysys.data.texts import Texts
from raysys.nn.body import TextBody, pool
from raysys.nn.lora import Layout, load_factors, peft_factors, peft_model
from raysys.nn.textstore import TextStore
from raysys.runtime.seeds import Seeds, Stream
from raysys.systems.tad_lora.setting import Setting

I64 = NDArray[np.int64]
F32 = NDArray[np.float32]
Moments = dict[str, F32]
"""Adam's state of the factors: "A.exp_avg" (k, size_a) and so on; empty where it starts anew each round."""
EVAL_BATCH = 32


class Learner(Protocol):
    """Local training on a problem, for any of its peers."""

    layout: Layout

    def train(
        self,
        nodes: I64,
        a: Tensor,
        b: Tensor,
        round: int,
        active: str,
        moments: Moments,
        shift: Sequence[Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        """Factors after a round's local steps on the `active` ones. `moments` is read and updated in place."""

    def evaluate(self, nodes: I64, a: Tensor, b: Tensor, shift: Sequence[Tensor] | None) -> F32:
        """(k, N) or (k, 1): how right each model is, per test item."""


class Steps:
    """What all text learners share: the data, its division, batches, the optimizer's settings."""

    def __init__(
        self,
        body: TextBody,
        head: Tensor,
        train: Texts,
        test: Texts,
        division: Sequence[I64],
        setting: Setting,
        seeds: Seeds,
    ) -> None:
        self.body, self.head, self.setting, self.seeds = body, head.to(body.device), setting, seeds
        self.layout, self.texts, self.held_out, self.division = body.layout, train, test, division
        self.y, self.test_y = torch.from_numpy(train.y).to(body.device), torch.from_numpy(test.y)
        self.keeps = setting.optimizer_state == "kept" and setting.optimizer == "adamw"

    def batch(self, nodes: I64, round: int, step: int) -> I64:
        """Rows (k, b) of the training texts, drawn with replacement from each peer's own."""
        sizes = np.array([len(self.division[i]) for i in nodes])
        # A local step is its own draw: rounds are spaced far apart in the stream's round counter.
        drawn = self.seeds.integers(Stream.BATCH, nodes, round + (step << 40), self.setting.batch, sizes)
        return np.stack([self.division[i][row] for i, row in zip(nodes, drawn, strict=True)])

    def optimizer(self, groups: dict[str, list[Tensor]], round: int) -> torch.optim.Optimizer:
        """AdamW (betas .9 and .999, eps 1e-8, no decay: the defaults of Hugging Face's trainer) or plain SGD."""
        parameters = [parameter for group in groups.values() for parameter in group]
        lr = self.setting.step_size(round)
        if self.setting.optimizer == "sgd":
            return torch.optim.SGD(parameters, lr=lr)
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0, foreach=False)


class GroupedLearner(Steps):
    """All peers of a block in one forward and backward pass, from the kept states below the lowest adapted layer."""

    def __init__(
        self, body: TextBody, store: TextStore, held: TextStore, head: Tensor, train: Texts, test: Texts,
        division: Sequence[I64], setting: Setting, seeds: Seeds,
    ) -> None:  # fmt: skip
        super().__init__(body, head, train, test, division, setting, seeds)
        self.store, self.held = store, held

    def train(
        self,
        nodes: I64,
        a: Tensor,
        b: Tensor,
        round: int,
        active: str,
        moments: Moments,
        shift: Sequence[Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        device = self.body.device
        encoded = self.store.of(np.concatenate([self.division[i] for i in nodes]))
        shift = None if shift is None else [each.to(device) for each in shift]
        leaves = {"A": a.to(device).clone(), "B": b.to(device).clone()}
        groups = {name: [leaves[name].requires_grad_(True)] for name in active}
        optimizer = self.optimizer(groups, round)
        restore(optimizer, groups, moments)
        for step in range(self.setting.steps):
            rows = self.batch(nodes, round, step)
            logits = self.body.pooled(encoded, rows, leaves["A"], leaves["B"], shift) @ self.head.T
            each = F.cross_entropy(logits.flatten(0, 1), self.y[torch.from_numpy(rows).flatten()], reduction="none")
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(each.view(rows.shape).mean(1).sum())
            optimizer.step()
        if self.keeps:
            moments.update(saved(optimizer, groups, len(nodes)))
        return leaves["A"].detach().cpu(), leaves["B"].detach().cpu()

    @torch.no_grad()
    def evaluate(self, nodes: I64, a: Tensor, b: Tensor, shift: Sequence[Tensor] | None) -> F32:
        device, total = self.body.device, len(self.held_out.y)
        shift = None if shift is None else [each.to(device) for each in shift]
        encoded = self.held.of(np.arange(total))
        found = []
        for at in range(0, total, EVAL_BATCH):
            rows = np.repeat(np.arange(at, min(at + EVAL_BATCH, total))[None], len(a), 0)
            logits = self.body.pooled(encoded, rows, a.to(device), b.to(device), shift) @ self.head.T
            found.append(logits.argmax(-1).cpu() == self.test_y[rows])
        return torch.cat(found, 1).float().numpy()


class PeftLearner(Steps):
    """One peft model, given each peer's factors in turn, running the whole body on every text: how public codes do it."""

    def __init__(
        self,
        body: TextBody,
        head: Tensor,
        train: Texts,
        test: Texts,
        division: Sequence[I64],
        setting: Setting,
        seeds: Seeds,
    ) -> None:
        super().__init__(body, head, train, test, division, setting, seeds)
        self.model = peft_model(copy.deepcopy(body.base.model), body.layout)

    def logits(self, texts: Texts, rows: I64) -> Tensor:
        """(b, C) of the model as it is."""
        second = None if texts.second is None else [texts.second[i] for i in rows]
        made = self.body.tokens([texts.first[i] for i in rows], second)
        out = self.model(**made).last_hidden_state
        return pool(out, made["attention_mask"], self.body.base.causal) @ self.head.T

    def train(
        self,
        nodes: I64,
        a: Tensor,
        b: Tensor,
        round: int,
        active: str,
        moments: Moments,
        shift: Sequence[Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        if shift is not None:
            raise ValueError("backend: got peft; methods that change the frozen weights need the backend grouped")
        trained = a.clone(), b.clone()
        parameters = dict(zip("AB", peft_factors(self.model, self.layout), strict=True))
        for name, group in parameters.items():
            for parameter in group:
                parameter.requires_grad_(name in active)
        batches = [self.batch(nodes, round, step) for step in range(self.setting.steps)]
        kept: list[Moments] = []
        for k in range(len(nodes)):
            load_factors(self.model, self.layout, a[k], b[k])
            groups: dict[str, list[Tensor]] = {name: list(parameters[name]) for name in active}
            optimizer = self.optimizer(groups, round)
            mine = {key: value[k : k + 1] for key, value in moments.items()}
            restore(optimizer, groups, mine)
            for rows in batches:
                loss = F.cross_entropy(self.logits(self.texts, rows[k]), self.y[torch.from_numpy(rows[k])])
                optimizer.zero_grad(set_to_none=True)
                torch.autograd.backward(loss)
                optimizer.step()
            if self.keeps:
                kept.append(saved(optimizer, groups, 1))
            for flat, name in zip(trained, "AB", strict=True):
                flat[k] = self.layout.join([p.detach().cpu() for p in parameters[name]])
        if kept:
            moments.update({key: np.concatenate([each[key] for each in kept]) for key in kept[0]})
        return trained

    @torch.no_grad()
    def evaluate(self, nodes: I64, a: Tensor, b: Tensor, shift: Sequence[Tensor] | None) -> F32:
        found = []
        total = len(self.held_out.y)
        for k in range(len(a)):
            load_factors(self.model, self.layout, a[k], b[k])
            pieces = [np.arange(at, min(at + EVAL_BATCH, total)) for at in range(0, total, EVAL_BATCH)]
            chosen = torch.cat([self.logits(self.held_out, rows).argmax(-1).cpu() for rows in pieces])
            found.append((chosen == self.test_y).float())
        return torch.stack(found).numpy()


def restore(optimizer: torch.optim.Optimizer, groups: dict[str, list[Tensor]], moments: Moments) -> None:
    """Give Adam back what was saved of the factors it is to train."""
    for name, parameters in groups.items():
        if f"{name}.step" not in moments:
            continue
        cut = [p.numel() // len(moments[f"{name}.step"]) for p in parameters]
        for key in ("exp_avg", "exp_avg_sq"):
            parts = torch.split(torch.from_numpy(moments[f"{name}.{key}"]), cut, dim=1)
            for parameter, part in zip(parameters, parts, strict=True):
                optimizer.state[parameter][key] = part.reshape(parameter.shape).to(parameter.device).clone()
        for parameter in parameters:
            optimizer.state[parameter]["step"] = torch.tensor(float(moments[f"{name}.step"].max()))


def saved(optimizer: torch.optim.Optimizer, groups: dict[str, list[Tensor]], peers: int) -> Moments:
    """Adam's moments of the trained factors of so many peers, as flat rows."""
    found: Moments = {}
    for name, parameters in groups.items():
        state = [optimizer.state[p] for p in parameters]
        for key in ("exp_avg", "exp_avg_sq"):
            found[f"{name}.{key}"] = torch.cat([s[key].reshape(peers, -1) for s in state], 1).cpu().numpy()
        found[f"{name}.step"] = np.full(peers, float(state[0]["step"]), np.float32)
    return found
