"""One start of Ray Train's workers.

Notable choices
- An attempt ends when all workers are done or one is lost; what happens then is the caller's business (`train.fit`).
- It runs in a thread, so that the caller's thread can log, commit, move the bar, and answer Ctrl-C at once.
- What the learner raised comes back as it was, or as a `LearnerError` with its traceback; everything else that ends a
  worker (its process or machine died, a peer did) counts as a loss.
"""

from __future__ import annotations

import os
import threading
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import ray
import torch
from ray.train import ControllerError, FailureConfig, RunConfig, ScalingConfig, WorkerGroupError, get_context
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.util.queue import Empty, Queue

from raysys.runtime.checkpoint import CheckpointError
from raysys.runtime.exact import Peers
from raysys.runtime.sentences import UserError
from raysys.runtime.steps import LearnerError, Task, WorkersLost, train_here

QUIET = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths of the user mean the same in a worker
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # recovery needs no notice, and the watcher is one more process
}


class Attempt(threading.Thread):
    """Starts the workers of a task; `follow` waits for their end.

    Args:
        task: what each worker does.
        start_timeout_s: how long they may take to find a place.
    """

    def __init__(self, task: Task, start_timeout_s: float) -> None:
        super().__init__(name="ray-train", daemon=True)
        self.task, self.start_timeout_s = task, start_timeout_s
        here = ray.get_runtime_context().get_node_id()  # what workers tell must not be lost with another machine
        self.mail = Queue(actor_options={"num_cpus": 0, "label_selector": {"ray.io/node-id": here}})
        self.error: Exception | None = None

    def follow(self, take: Callable[..., None]) -> None:
        """Pass on what the first worker tells, until the attempt is over.

        Raises:
            UserError, FloatingPointError, CheckpointError, LearnerError: a worker raised it.
            WorkersLost: a worker died.
            TimeoutError: the workers found no place in time.
        """
        self.start()
        try:
            over = False
            while True:
                try:
                    take(*self.mail.get(timeout=0.2))
                except Empty:
                    if over:
                        break
                    over = not self.is_alive()
        finally:
            self.mail.shutdown(force=True)  # workers that still run find nobody to tell, and end
        if self.error is not None:
            self._explain(self.error)

    def _explain(self, error: Exception) -> None:
        if isinstance(error, WorkerGroupError):
            failures = sorted(error.worker_failures.items())
            for _, failure in failures:
                if isinstance(failure, UserError | FloatingPointError | CheckpointError | LearnerError):
                    raise failure from None
            raise WorkersLost("; ".join(f"worker {rank}: {_first_line(e)}" for rank, e in failures)) from error
        kind = type(error.controller_failure).__name__ if isinstance(error, ControllerError) else ""
        if kind == "WorkerGroupStartupTimeoutError":
            free = {k: v for k, v in ray.available_resources().items() if k in ("CPU", "GPU")}
            workers, limit = self.task.config.workers, self.start_timeout_s
            raise TimeoutError(f"{workers} workers could not all be started within {limit:g} s; free {free}") from error
        if kind == "WorkerGroupStartupFailedError":
            raise WorkersLost(_first_line(error.controller_failure)) from error  # type: ignore[attr-defined]
        raise error

    def run(self) -> None:
        config, storage = self.task.config, self.task.storage
        assert storage is not None
        os.environ.update({name: os.environ.get(name, value) for name, value in QUIET.items()})
        os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(self.start_timeout_s)
        gpus = config.gpus_per_worker
        on_cpus = {} if gpus else {"DS_ACCELERATOR": "cpu"}  # DeepSpeed must not guess: torch may be built for CUDA
        try:
            Trainer(
                partial(_work, self.task, self.mail),
                scaling_config=ScalingConfig(
                    num_workers=config.workers,
                    use_gpu=gpus > 0,
                    resources_per_worker={"CPU": config.cpus_per_worker, **({"GPU": gpus} if gpus else {})},
                ),
                torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
                run_config=RunConfig(
                    name="train",
                    storage_path=storage.address(self.task.scratch),
                    worker_runtime_env={"env_vars": on_cpus},
                    failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
                ),
            ).fit()
        except Exception as error:  # noqa: BLE001 (`follow` raises it in the caller's thread)
            self.error = error


class Trainer(TorchTrainer):  # type: ignore[misc]
    """Ray Train without its PlacementGroupCleaner.

    Nothing in Ray Train 2.60 needs a dashboard but this detached process, which asks the state API every second whether
    the Train controller is alive. The state API looks for a cluster in /tmp/ray/ray_current_cluster, not for its own. If
    that file names a dead cluster, a question takes 40 s, and every training waits 12 s for it at its end; if it names
    somebody else's, the answer is that the controller is dead, and the cleaner takes the workers' places away. It is
    there for a controller that dies while the job lives on; our jobs then end.
    """

    def _create_default_callbacks(self) -> list[Any]:
        made = super()._create_default_callbacks()
        return [callback for callback in made if type(callback).__name__ != "PlacementGroupCleanerCallback"]


def _work(task: Task, mail: Queue) -> None:
    """What Ray Train runs in each worker."""
    context = get_context()
    peers = Peers(context.get_world_rank(), context.get_world_size())

    def tell(kind: str, step: int, details: dict[str, Any]) -> None:
        mail.put((kind, step, details))

    try:
        train_here(task, str(get_device()) if task.config.gpus_per_worker else "cpu", peers, tell)
    except (UserError, FloatingPointError, CheckpointError):
        raise
    except Exception as error:
        if _peer_is_gone(error):
            raise
        raise LearnerError(f"a worker raised {type(error).__name__}: {error}\n{traceback.format_exc()}") from None


def _peer_is_gone(error: Exception) -> bool:
    """Whether an error only says that another process (a worker, or the controller) no longer answers."""
    words = str(error).lower()
    return (
        isinstance(error, ray.exceptions.RayError | torch.distributed.DistError) or "gloo" in words or "nccl" in words
    )


def _first_line(error: object) -> str:
    return str(error).splitlines()[0][:200]
