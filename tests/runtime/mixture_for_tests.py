"""A small learner with a mixture of experts, and the engines that train it side by side in two processes without Ray.

python mixture_for_tests.py RANK PORT     one JSON line per DeepSpeed stage, optimizer and number of workers that share experts
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raysys.nn.balance import max_violation, parameter_groups
from raysys.nn.moe import MoE, loads
from raysys.runtime.seeds import Seeds, Stream

WIDTH, EXPERTS = 12, 8


class Model(nn.Module):
    """Linear, two mixtures with residual, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.out = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 1)
        self.layers = nn.ModuleList(MoE(WIDTH, EXPERTS, 2, 5, shared) for shared in (4, 0))
        self.load = torch.zeros(EXPERTS)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inside(x)
        for layer in self.layers:
            y, routed = layer(h)
            h = h + y
        self.load = loads(routed, EXPERTS)
        z: Tensor = self.out(h)
        return z


class MixtureRegression:
    """Fitted to made-up numbers; blocks have different sizes. `deadly` names a file, as in learners_for_tests.Regression."""

    blocks = 4

    def __init__(
        self, device: str, *, steps: int = 12, kind: str = "sgd", deadly: str = "", deadly_step: int = 7
    ) -> None:
        self.steps, self.kind, self.device, self.deadly, self.deadly_step = steps, kind, device, deadly, deadly_step
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.module = Model().to(device)

    def loss(self, step: int, block: int) -> Tensor:
        if self.deadly and (step, block) == (self.deadly_step, 1) and not os.path.exists(self.deadly):
            Path(self.deadly).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        x = torch.randn(3 + 5 * block, 6, generator=Seeds(1).generator(Stream.BATCH, block, step)).to(self.device)
        return (self.module(x) - x.sum(1, keepdim=True).sin() - 2).square().mean()

    def learning_rate(self, step: int) -> float:
        return 0.05 / (1 + 0.1 * step)

    def optimizer(self) -> torch.optim.Optimizer:
        if self.kind == "adam":
            return torch.optim.AdamW(parameter_groups(self.module, rate=0.05, speed=0.01))
        slow = list(self.module.out.parameters())
        rest = [p for p in self.module.parameters() if all(p is not q for q in slow)]
        return torch.optim.SGD(
            [{"params": rest}, {"params": slow, "lr_scale": 0.3}], momentum=0.9 * (self.kind != "sgd")
        )

    def metrics(self) -> dict[str, float]:
        return {"violation": float(max_violation(self.module.load))}

    def before(self, step: int) -> None:
        pass


def mixture(**options: object) -> Callable[[str], MixtureRegression]:
    return partial(MixtureRegression, **options)  # type: ignore[arg-type]


def main(rank: int) -> None:
    from raysys.runtime.exact import Exact, Peers
    from raysys.runtime.expert_groups import ExpertGroups
    from raysys.runtime.sentences import UserError
    from raysys.runtime.train import TrainConfig
    from raysys.runtime.zero import Zero

    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    early, more = 5, 3

    def run(config: TrainConfig, optimizer: str, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[float]]:
        kind: Any = Exact if config.deepspeed == "off" else Zero
        engine = kind(
            mixture(kind=optimizer)("cpu"), "cpu", config, Peers() if kind is Exact else Peers(rank, 2), state
        )
        steps = range(early, early + more) if state else range(early)
        losses = [engine.step(step, True).loss for step in steps]
        return engine.state(), losses

    def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
        assert a.keys() == b.keys(), sorted(a.keys() ^ b.keys())
        assert all(a[key].shape == b[key].shape for key in a)
        return max(float((a[key].double() - b[key].double()).abs().max()) for key in a)

    cases = [("sgd", None, stage, size) for stage in ("zero0", "zero1", "zero2") for size in (1, 2)]
    cases += [
        ("sgd", 0.05, "zero1", 2),
        ("adam", None, "zero0", 2),
        ("adam", 0.05, "zero1", 2),
        ("adam", None, "zero2", 2),
    ]
    cases += [("adam", None, "zero3", 1)]
    known = dict[tuple[str, float | None], Any]()
    for optimizer, clip, stage, size in cases:
        off = TrainConfig(clip=clip)
        if (optimizer, clip) not in known:
            known[optimizer, clip] = first = run(off, optimizer, {})
            known[optimizer, clip] = *first, *run(off, optimizer, first[0])
        reference, expected, further, later = known[optimizer, clip]
        split = TrainConfig(workers=2, clip=clip, deepspeed=stage, expert_parallel=size)
        zero, losses = run(split, optimizer, {})
        resumed, resumed_losses = run(split, optimizer, zero)
        other = (
            split if stage == "zero3" else TrainConfig(workers=2, clip=clip, deepspeed=stage, expert_parallel=3 - size)
        )
        row = {
            "stage": stage, "optimizer": optimizer, "clip": clip, "size": size, "apart": apart(reference, zero),
            "losses": max(abs(a - b) for a, b in zip(losses + resumed_losses, expected + later, strict=True)),
            "resumed": apart(further, resumed), "into off": apart(further, run(off, optimizer, zero)[0]),
            "into other": apart(further, run(other, optimizer, zero)[0]),
            "moved": apart(*({k: v for k, v in s.items() if k.startswith("module/")} for s in (reference, further))),
        }  # fmt: skip
        if rank == 0:
            print(json.dumps(row), flush=True)
    refused = {}
    for name, module in (("none", nn.Linear(2, 2)), ("nine", MoE(WIDTH, 9, 2, 4, 0))):
        try:
            ExpertGroups(module, 2)
        except UserError as error:
            refused[name] = str(error)
    if rank == 0:
        print(json.dumps(refused), flush=True)


if __name__ == "__main__":
    os.environ.update(DS_ACCELERATOR="cpu", MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[2], LOCAL_RANK=sys.argv[1])
    torch.set_num_threads(1)
    main(int(sys.argv[1]))
