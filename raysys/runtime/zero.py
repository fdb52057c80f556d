"""Training steps by DeepSpeed: ZeRO splits optimizer state (1), gradients (2) and parameters (3) over the workers.

Notable choices
- DeepSpeed gets the loss as its model, so that a learner may use its module as it likes; a step is made of as many
  micro-batches as a worker has blocks, and DeepSpeed's mean over both is the mean over blocks.
- bf16 is autocast, as without DeepSpeed: parameters and optimizer state stay float32 (split over the workers).
- DeepSpeed's own checkpoints are pickles and fit one number of workers. Ours hold every parameter and its optimizer state
  whole, gathered one by one, so they are read by any stage, any number of workers, and without DeepSpeed.
- DeepSpeed makes its optimizer state at the first step. To resume, one step is made at rate 0, which changes no parameter,
  and the state that it made is overwritten.
- Experts may be shared out over workers (`expert_groups.py`); what is saved is gathered.
- Everything is pure torch and gloo on CPUs. Left alone, DeepSpeed would compile a shared-memory collective with ninja
  under a file lock at the first `init_distributed` (minutes; a killed run leaves the lock), and want its own CPU Adam.

Not bit for bit: reductions are all-reduces, so results equal those of other numbers of workers up to rounding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from raysys.runtime.exact import (
    Measured,
    Peers,
    State,
    block_loss,
    finite,
    load_module,
    mean_metrics,
    module_state,
    optimizer_of,
    optimizer_state,
    set_rate,
    trainable,
    whole_state,
)
from raysys.runtime.expert_groups import ExpertGroups
from raysys.runtime.sentences import UserError

if TYPE_CHECKING:
    from raysys.runtime.train import Learner, TrainConfig

BUCKET = 500_000_000


class Zero:
    """Steps by DeepSpeed at the ZeRO stage of the configuration; needs a torch process group (Ray Train made one)."""

    def __init__(self, learner: Learner, device: str, config: TrainConfig, peers: Peers, state: State) -> None:
        self.learner, self.peers, self.device = learner, peers, torch.device(device)
        load_module(learner.module, state)
        _start()
        self.experts = ExpertGroups(learner.module, config.expert_parallel) if config.expert_parallel > 1 else None
        self.named = trainable(learner.module)
        self.optimizer = optimizer_of(learner, self.named)
        self.stage = int(config.deepspeed.removeprefix("zero"))
        self._pending = optimizer_state(state)
        self._linked = self.stage not in (1, 2)
        loss = _Loss(learner, self.device, config.bf16)
        if self.experts is not None:
            self.experts.split(self.optimizer)
            self._pending = self.experts.own(self._pending, self.named)
            loss.experts = self.experts.marker()
        self.engine = _initialize(loss, self.optimizer, self._settings(config))

    def _settings(self, config: TrainConfig) -> dict[str, Any]:
        count = self.peers.count
        return {
            "train_batch_size": self.learner.blocks,
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": self.learner.blocks // count,
            "gradient_clipping": config.clip or 0.0,
            "zero_optimization": {
                "stage": self.stage,
                "reduce_bucket_size": min(BUCKET, max(1, sum(p.numel() for p in self.named.values()))),
            },
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 2**40,
        }

    def step(self, step: int, measure: bool) -> Measured:
        if self._pending:
            self._micro_steps(step, 0.0, measure=False)
            self._overwrite_optimizer_state()
        return self._micro_steps(step, self.learner.learning_rate(step), measure)

    def _micro_steps(self, step: int, rate: float, measure: bool) -> Measured:
        set_rate(self.optimizer, rate)
        metrics = list[dict[str, float]]()
        losses = list[Tensor]()
        for first in range(0, self.learner.blocks, self.peers.count):
            loss = self.engine(step, first + self.peers.rank)
            losses.append(loss.detach().double())
            if measure:
                metrics.append(dict(self.learner.metrics()))
            self.engine.backward(loss)
            if first + self.peers.count == self.learner.blocks:
                whole = torch.stack(self.peers.gather(torch.stack(losses)), dim=1).flatten()
                finite(float(whole.mean()), step)
            self.engine.step()
        if not self._linked:
            self._link_optimizer_state()
        return Measured(float(whole.mean()), mean_metrics(metrics, self.peers, self.device))

    def _link_optimizer_state(self) -> None:
        """Tell each parameter where its optimizer state is.

        DeepSpeed 0.19.8 does so after the first step of the first group, when the other groups have none yet.
        """
        from deepspeed.utils.mixed_precision_linkage import lazy_init_hp_params_optimizer_state

        inner = self.engine.optimizer
        for parameters, flat in zip(inner.bit16_groups, inner.single_partition_of_fp32_groups, strict=True):
            lazy_init_hp_params_optimizer_state(parameters, flat, inner.optimizer.state)
        self._linked = True

    def state(self) -> State:
        state = self._state()
        if self.experts is not None:
            for key in sorted(state):  # in one order everywhere: each may be gathered
                name = key.removeprefix("module/")
                if key.startswith("optimizer/"):
                    name = key.removeprefix("optimizer/").rpartition("/")[0]
                if name in self.named:
                    state[key] = self.experts.whole(name, state[key], self.named[name]).cpu()
        return state

    def _state(self) -> State:
        """The state, with this worker's share of shared-out experts."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if self.stage == 0:
            return whole_state(self.learner, self.named, self.optimizer)
        split, whole = self._keys()
        full = {name: safe_get_full_fp32_param(p).view(_shape(p)) for name, p in self.named.items()}
        state = module_state(self.learner.module, full)
        for name, p in self.named.items():
            for key in split:
                value = safe_get_full_optimizer_state(p, key).view(_shape(p))
                state[f"optimizer/{name}/{key}"] = value.detach().cpu()
            for key, value in whole.items():
                state[f"optimizer/{name}/{key}"] = value.detach().cpu()
        return state

    def _keys(self) -> tuple[list[str], dict[str, Tensor]]:
        """Keys of the optimizer state that is split with the parameters, and the state that is not (Adam's count)."""
        split, whole = dict[str, None](), dict[str, Tensor]()
        for flat, content in self.optimizer.state.items():
            for key, value in content.items():
                if isinstance(value, Tensor) and value.shape == flat.shape:
                    split[key] = None
                elif isinstance(value, Tensor):
                    whole[key] = value
        return list(split), whole

    def _overwrite_optimizer_state(self) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        pending, self._pending = self._pending, {}
        if self.stage == 0:
            for name, p in self.named.items():
                for key, value in pending.get(name, {}).items():
                    self.optimizer.state[p][key].copy_(value)
            return
        split, whole = self._keys()
        for name, p in self.named.items():
            for key in split:
                value = pending[name][key].to(self.device)
                if self.stage < 3:
                    safe_set_full_optimizer_state(p, value, key)
                else:  # DeepSpeed 0.19.8 cannot take a whole value whose size the number of workers does not divide
                    safe_set_local_optimizer_state(p, self._own_part(value), key)
        for content in self.optimizer.state.values():
            for key in whole:
                content[key].copy_(next(iter(pending.values()))[key])

    def _own_part(self, value: Tensor) -> Tensor:
        """The part of a whole value that ZeRO-3 keeps on this worker: equal shares of the flat value, padded with zeros."""
        share = -(-value.numel() // self.peers.count)
        padded = torch.nn.functional.pad(value.flatten(), (0, share * self.peers.count - value.numel()))
        return padded[share * self.peers.rank :][:share]


class _Loss(nn.Module):
    """The loss of a block as a module, which is what DeepSpeed wraps."""

    def __init__(self, learner: Learner, device: torch.device, bf16: bool) -> None:
        super().__init__()
        self.module = learner.module
        self._ask = (learner, device, bf16)

    def forward(self, step: int, block: int) -> Tensor:
        learner, device, bf16 = self._ask
        return block_loss(learner, step, block, device, bf16)


def _start() -> None:
    """Let DeepSpeed take over the process group."""
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as error:
        raise UserError(f"train.deepspeed: {error}; install raysys[deepspeed], or train with deepspeed off") from error
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), auto_mpi_discovery=False)


def _initialize(model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any]) -> Any:
    import deepspeed

    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]


def _shape(p: nn.Parameter) -> torch.Size:
    """The shape of the whole parameter; ZeRO-3 leaves an empty tensor in its place."""
    return getattr(p, "ds_shape", p.shape)
