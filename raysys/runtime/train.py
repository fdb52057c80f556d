"""Training, from one process to many machines: the one place where systems meet Ray Train and DeepSpeed.

    state = fit(run.stage("train"), session, partial(make_learner, config), config.train)

`make_learner(config, device)` returns a `Learner`: plain torch, which knows neither Ray nor how many workers there are.

Notable choices
- Without DeepSpeed the result has the same bits for any number of workers and in this process (`exact.py`). With DeepSpeed
  it equals that up to rounding (`zero.py`). Both write the same checkpoints, so a run may be continued with the other.
- The controller commits: the first worker writes the state's file and tells its hash; the controller, having logged
  every row up to there, writes the manifest. So a resumed stage has each row once, and a damaged file is refused.
- A lost worker ends Ray Train's attempt, and a new one starts from the last commit. Losses are counted here and not by
  Ray Train's FailureConfig, because that one tries bugs again too, and counts over a whole run what should be counted
  between two checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol, Self

import ray
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from raysys.runtime.config import Config
from raysys.runtime.exact import Peers
from raysys.runtime.ledger import Ledger, module_part
from raysys.runtime.progress import Progress
from raysys.runtime.sentences import UserError
from raysys.runtime.session import ClusterConfig, Session
from raysys.runtime.stage import Stage
from raysys.runtime.steps import LearnerError, Task, WorkersLost, train_here

__all__ = ["Learner", "LearnerError", "TrainConfig", "fit", "fit_here"]


class TrainConfig(Config):
    """How training is spread over processes. Only deepspeed, bf16, clip and cpus_per_worker touch the numbers."""

    workers: int = Field(1, ge=1, le=10_000)
    """Training processes (data parallel); must divide the blocks of a step."""
    gpus_per_worker: float = Field(0.0, ge=0)
    """GPUs reserved for a worker; above 0 it computes on CUDA and exchanges by NCCL, else on the CPU by gloo."""
    cpus_per_worker: float = Field(1.0, gt=0)
    """CPUs reserved for a worker; it computes with as many torch threads."""
    deepspeed: Literal["off", "zero0", "zero1", "zero2", "zero3"] = "off"
    """ZeRO stage: 1 splits optimizer state over workers, 2 also gradients, 3 also parameters; off needs no DeepSpeed."""
    expert_parallel: int = Field(1, ge=1)
    """Workers that share out the experts of a mixture, each computing with its own ones; needs deepspeed zero0 to zero2."""
    bf16: bool = False
    """Compute the loss in bfloat16 (autocast); parameters stay float32."""
    clip: float | None = Field(None, gt=0)
    """Largest norm of a step's gradient; a larger one is scaled down to it."""
    checkpoint_every: int = Field(100, ge=1)
    """Steps between checkpoints: what a failure or a kill can cost at most."""
    max_failures: int = Field(3, ge=0)
    """Times that workers may be lost after the same checkpoint before the run gives up."""

    @model_validator(mode="after")
    def _nccl_needs_whole_gpus(self) -> Self:
        if self.workers > 1 and self.gpus_per_worker % 1:
            raise ValueError(
                f"gpus_per_worker: got {self.gpus_per_worker:g} for {self.workers} workers; NCCL needs whole GPUs"
            )
        return self

    @model_validator(mode="after")
    def _experts_need_deepspeed_and_a_divisor_of_the_workers(self) -> Self:
        size = self.expert_parallel
        if size == 1:
            return self
        if self.deepspeed in ("off", "zero3"):
            raise ValueError(
                f"expert_parallel: got {size} with deepspeed {self.deepspeed}; expected zero0, zero1 or zero2"
            )
        if self.workers % size:
            raise ValueError(
                f"expert_parallel: got {size} for {self.workers} workers; expected a divisor of {self.workers}"
            )
        if self.deepspeed == "zero0" and self.clip is not None:
            raise ValueError(
                f"expert_parallel: got {size} with clip and deepspeed zero0, where DeepSpeed does not know the norm of shared"
                " out gradients; expected zero1 or zero2"
            )
        return self


class Learner(Protocol):
    """What is trained, in plain torch. All of it must be a function of `make`'s arguments, the step and the block.

    A step's batch is cut into `blocks` equal parts, whatever the number of workers; any worker may be asked for any block.
    What `before` keeps from one step for later ones must lie in buffers of the module (any shape): they are part of the
    checkpoint. `loss` itself must change no buffer, since each worker calls it for other blocks.
    """

    @property
    def module(self) -> nn.Module: ...  # its parameters with requires_grad are trained; buffers are kept with them

    @property
    def steps(self) -> int: ...  # in all

    @property
    def blocks(self) -> int: ...

    def loss(self, step: int, block: int) -> Tensor:
        """Scalar: the mean loss over the block. The step's loss is the mean over its blocks."""

    def learning_rate(self, step: int) -> float: ...

    def optimizer(self) -> torch.optim.Optimizer:
        """Over trainable parameters of the module. A group's rate is set before each step: that of the step, times the group's
        `lr_scale` if it has one."""

    def metrics(self) -> dict[str, float]:
        """Measured in the block whose loss was computed last (may be empty); logged as the mean over a step's blocks."""

    def before(self, step: int) -> None:
        """Called in every worker before a step, and again when it is repeated: a function of the module's state and the step."""


def fit(
    stage: Stage,
    session: Session | None,
    make: Callable[[str], Learner],
    config: TrainConfig,
    *,
    log_every: int = 10,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Train in Ray workers, or go on from the stage's last checkpoint.

    Args:
        stage: where rows and checkpoints go.
        session: the cluster's session; None for whatever Ray this process is connected to.
        make: builds the learner on a device ("cpu", "cuda:0") in each worker; small and picklable, such as a partial
            of a function of a module.
        log_every: steps between logged rows (loss, learning_rate and the learner's metrics); the last step always is.
        progress: advanced by steps as they are done.

    Returns:
        The trained parameters and the buffers of the module by name: CPU, floats as float32.

    Raises:
        UserError: the cluster cannot hold the workers, they do not divide the blocks, or make() said so.
        FloatingPointError: a loss was not finite.
        LearnerError: the learner raised something else.
        RuntimeError: workers were lost more than `max_failures` times after the same checkpoint.
        TimeoutError: the workers found no place within the session's start_timeout_s.
    """
    from raysys.runtime.attempt import Attempt  # Ray Train takes seconds to import, and --help needs none of it

    ledger = Ledger(stage, progress)
    done = ledger.result()
    if done is not None:
        return done
    if session is not None:
        session.release()
    _refuse_too_many(session, config)
    cluster = session.config if session is not None else ClusterConfig()
    try:
        while True:
            try:
                Attempt(ledger.task(make, config, log_every), cluster.start_timeout_s).follow(ledger.take)
                return ledger.final()
            except WorkersLost as loss:
                ledger.losses += 1
                stage.run.event("workers lost", stage=stage.name, reason=str(loss), losses=ledger.losses)
                if ledger.losses > config.max_failures:
                    raise RuntimeError(
                        f"workers were lost {ledger.losses} times after the same checkpoint: {loss}"
                    ) from loss
    finally:
        stage.run.storage.delete(f"{stage.folder}/ray")


def fit_here(
    stage: Stage | None,
    make: Callable[[str], Learner],
    config: TrainConfig,
    *,
    log_every: int = 10,
    progress: Progress | None = None,
    device: str = "cpu",
) -> dict[str, Tensor]:
    """Train in this process: the same bits as `fit` with any number of workers. Without a stage nothing is logged or saved.

    Raises:
        UserError: DeepSpeed is asked for.
        FloatingPointError: a loss was not finite.
    """
    if config.deepspeed != "off":
        raise UserError(f"train.deepspeed: got {config.deepspeed}; training in the job's own process takes only off")
    if stage is None:
        return module_part(train_here(Task(make, config, log_every), device, Peers(), _advance(progress)))
    ledger = Ledger(stage, progress)
    done = ledger.result()
    if done is None:
        train_here(ledger.task(make, config, log_every), device, Peers(), ledger.take)
        done = ledger.final()
    return done


def _refuse_too_many(session: Session | None, config: TrainConfig) -> None:
    """Refuse workers that the cluster cannot hold, unless it may grow."""
    if session is not None and not session.embedded:
        return
    have = ray.cluster_resources()
    cpus, gpus = have.get("CPU", 0.0), have.get("GPU", 0.0)
    c = config
    if c.workers * c.cpus_per_worker > cpus + 1e-9 or c.workers * c.gpus_per_worker > gpus + 1e-9:
        raise UserError(
            f"train.workers: got {c.workers} workers of {c.cpus_per_worker:g} CPUs and {c.gpus_per_worker:g} GPUs;"
            f" there are {cpus:g} CPUs and {gpus:g} GPUs, so lower workers, cpus_per_worker or gpus_per_worker"
        )


def _advance(progress: Progress | None) -> Callable[[str, int, dict[str, Any]], None]:
    """Rows are kept by nobody; a bar still moves."""
    done = 0

    def take(kind: str, step: int, details: dict[str, Any]) -> None:
        nonlocal done
        now = step + (kind == "row")
        if progress is not None and now > done:
            progress.advance(now - done)
            done = now

    return take
