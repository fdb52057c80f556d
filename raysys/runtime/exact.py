"""Training steps whose bits do not depend on how many workers make them: plain data parallelism with a fixed order of sums.

Notable choices
- A step's batch is cut into blocks, and block b belongs to worker b mod W. Workers exchange the gradient of each block, not
  sums of their own, and everyone adds them in the order of the blocks: floating-point addition is not associative, so an
  all-reduce would give other bits for each W. The price is W times the traffic of an all-reduce.
- Every worker then makes the same optimizer step on the same numbers, so nothing is sent back.
- torch's global generator is set before each block from (step, block): dropout draws the same numbers wherever the block is.

Shapes: n trainable numbers, W workers, B blocks, B a multiple of W.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch import distributed as dist

from raysys.runtime.checkpoint import CheckpointError

if TYPE_CHECKING:
    from raysys.runtime.train import Learner, TrainConfig

State = dict[str, Tensor]
"""CPU tensors by name: module/PARAMETER, module/BUFFER and optimizer/PARAMETER/KEY, whatever engine wrote them."""


class Measured(NamedTuple):
    """What a step gave: the mean over its blocks of the loss and of each of the learner's metrics (if they were asked for)."""

    loss: float
    metrics: dict[str, float]


class Engine(Protocol):
    """How steps are made. All workers call the same methods in the same order."""

    def step(self, step: int, measure: bool) -> Measured: ...

    def state(self) -> State: ...


class Peers:
    """The workers of a training run, in the order of their ranks; alone, there is nobody to ask."""

    def __init__(self, rank: int = 0, count: int = 1) -> None:
        self.rank, self.count = rank, count

    def gather(self, mine: Tensor) -> list[Tensor]:
        """Everybody's tensor (all of one shape), by rank."""
        if self.count == 1:
            return [mine]
        theirs = [torch.empty_like(mine) for _ in range(self.count)]
        dist.all_gather(theirs, mine)
        return theirs


class Exact:
    """Steps with the same bits for every number of workers (given the same processors and torch threads)."""

    def __init__(self, learner: Learner, device: str, config: TrainConfig, peers: Peers, state: State) -> None:
        self.learner, self.peers, self.config, self.device = learner, peers, config, torch.device(device)
        load_module(learner.module, state)
        self.named = trainable(learner.module)
        self.optimizer = optimizer_of(learner, self.named)
        load_optimizer(self.optimizer, self.named, state)
        size = sum(p.numel() for p in self.named.values())
        self._mine = torch.empty(size + 1, device=self.device)  # (n + 1,): a block's gradient, then its loss
        self._total = torch.empty_like(self._mine)
        parts = torch.split(self._total[:-1], [p.numel() for p in self.named.values()])
        self._mean = [part.view_as(p) for part, p in zip(parts, self.named.values(), strict=True)]

    def step(self, step: int, measure: bool) -> Measured:
        learner, blocks, metrics = self.learner, self.learner.blocks, list[dict[str, float]]()
        self._total.zero_()
        for first in range(0, blocks, self.peers.count):
            self._gradient(step, first + self.peers.rank)
            if measure:
                metrics.append(dict(learner.metrics()))
            for theirs in self.peers.gather(self._mine):
                self._total += theirs
        self._total /= blocks
        loss = finite(float(self._total[-1]), step)
        if self.config.clip is not None:
            norm = self._total[:-1].norm()
            self._total[:-1] *= torch.clamp(self.config.clip / (norm + 1e-6), max=1.0)
        for p, mean in zip(self.named.values(), self._mean, strict=True):
            p.grad = mean
        set_rate(self.optimizer, learner.learning_rate(step))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return Measured(loss, mean_metrics(metrics, self.peers, self.device))

    def _gradient(self, step: int, block: int) -> None:
        loss = block_loss(self.learner, step, block, self.device, self.config.bf16)
        loss.backward()  # type: ignore[no-untyped-call]
        at = 0
        for p in self.named.values():
            place = self._mine[at : at + p.numel()]
            if p.grad is None:
                place.zero_()
            else:
                place.copy_(p.grad.reshape(-1))
            p.grad = None
            at += p.numel()
        self._mine[-1] = loss.detach()

    def state(self) -> State:
        return whole_state(self.learner, self.named, self.optimizer)


def block_loss(learner: Learner, step: int, block: int, device: torch.device, bf16: bool) -> Tensor:
    """The learner's loss of one block: a scalar, whose random numbers depend on (step, block) alone."""
    torch.manual_seed(step * learner.blocks + block)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        return learner.loss(step, block)


def finite(loss: float, step: int) -> float:
    """The loss, or FloatingPointError if it is no number that can be trained on."""
    if loss - loss != 0:
        raise FloatingPointError(
            f"the loss of step {step} is {loss}; expected a finite number: lower the learning rate, or look at that batch"
        )
    return loss


def mean_metrics(mine: list[dict[str, float]], peers: Peers, device: torch.device) -> dict[str, float]:
    """The mean over all blocks of what the learner measured in each, added in the order of the blocks."""
    if not mine or not mine[0]:
        return {}
    keys = sorted(mine[0])
    values = torch.tensor([[m[key] for key in keys] for m in mine], dtype=torch.float64, device=device)
    in_order = torch.stack(peers.gather(values), dim=1).reshape(-1, len(keys))  # (B, keys): block = round * W + rank
    total = torch.zeros(len(keys), dtype=torch.float64, device=device)
    for row in in_order:
        total += row
    return dict(zip(keys, (total / len(in_order)).tolist(), strict=True))


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that belong to the module's state, by name."""
    kept = module.state_dict(keep_vars=True)
    return {name: b for name, b in module.named_buffers() if name in kept}


def module_state(module: nn.Module, parameters: Mapping[str, Tensor]) -> State:
    """What is saved of a module: `parameters` and its buffers, on the CPU."""
    both = {**parameters, **buffers(module)}
    return {f"module/{name}": value.detach().cpu() for name, value in both.items()}


def load_module(module: nn.Module, state: State) -> None:
    """Put saved parameters and buffers into the module; nothing happens if the state is empty.

    Raises:
        CheckpointError: the state is of another module.
    """
    if not state:
        return
    saved = {key.removeprefix("module/"): value for key, value in state.items() if key.startswith("module/")}
    named, kept = trainable(module), buffers(module)
    if saved.keys() != named.keys() | kept.keys():
        other = sorted(saved.keys() ^ (named.keys() | kept.keys()))
        raise CheckpointError(f"the checkpoint is of another module: only one of the two has {', '.join(other[:3])}")
    for name, p in named.items():
        if saved[name].shape != p.shape:
            raise CheckpointError(
                f"the checkpoint is of another module: {name} has shape {tuple(saved[name].shape)} there"
            )
        p.data.copy_(saved[name])
    for name, buffer in kept.items():  # a buffer may have changed its shape since the module was built
        owner, _, last = name.rpartition(".")
        setattr(module.get_submodule(owner), last, saved[name].clone().to(buffer.device))


def optimizer_of(learner: Learner, named: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
    """The learner's optimizer, if it holds trainable parameters of the module and nothing else."""
    optimizer = learner.optimizer()
    known = {id(p) for p in named.values()}
    strange = sum(id(p) not in known for group in optimizer.param_groups for p in group["params"])
    if strange:
        raise ValueError(
            f"the optimizer holds {strange} tensors that are not trainable parameters of the learner's module"
        )
    return optimizer


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of each group: `rate`, times the group's `lr_scale` where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)


def whole_state(learner: Learner, named: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> State:
    """The module's state and, of each trained parameter, the optimizer's: `optimizer/<name>/<key>`."""
    state = module_state(learner.module, named)
    for name, p in named.items():
        for key, value in optimizer.state.get(p, {}).items():
            if value is not None:
                state[f"optimizer/{name}/{key}"] = value.detach().cpu()
    return state


def load_optimizer(optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter], state: State) -> None:
    """Put saved optimizer state into the optimizer."""
    per_name = optimizer_state(state)
    names = {id(p): name for name, p in named.items()}
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    content = {i: per_name[name] for i, name in enumerate(order) if name in per_name}
    if content:
        optimizer.load_state_dict({"state": content, "param_groups": optimizer.state_dict()["param_groups"]})


def optimizer_state(state: State) -> dict[str, State]:
    """The saved optimizer state of each parameter: name -> key -> tensor."""
    found: dict[str, State] = {}
    for key, value in state.items():
        if key.startswith("optimizer/"):
            name, _, what = key.removeprefix("optimizer/").rpartition("/")
            found.setdefault(name, {})[what] = value.clone()
    return found
