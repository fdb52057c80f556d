"""The training engines side by side in two processes joined by gloo, without Ray: prints how far apart they are.

python engines_for_tests.py RANK PORT     one JSON line per DeepSpeed stage and optimizer (from rank 0)
"""

from __future__ import annotations

import json
import os
import sys

import torch
from learners_for_tests import regression
from torch import Tensor

from raysys.runtime.exact import Engine, Exact, Peers, State
from raysys.runtime.train import TrainConfig
from raysys.runtime.zero import Zero

FIRST, MORE = 6, 4


def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys(), sorted(a.keys() ^ b.keys())
    return max(float((a[key].double() - b[key].double()).abs().max()) for key in a if key != "module/seen")


def run(
    kind: type[Exact | Zero], optimizer: str, config: TrainConfig, peers: Peers, state: State, first: int
) -> Engine:
    """Steps `first` to FIRST, or on to FIRST + MORE if there is a state; `losses` are kept on the engine."""
    learner = regression(kind=optimizer)("cpu")
    engine = kind(learner, "cpu", config, peers, state)
    losses = []
    for step in range(first, FIRST + MORE if state else FIRST):
        learner.before(step)
        losses.append(engine.step(step, True).loss)
    engine.losses = losses  # type: ignore[attr-defined]
    return engine


def main(rank: int) -> None:
    torch.manual_seed(0)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    both, alone = Peers(rank, 2), Peers()
    for stage in ("zero0", "zero1", "zero2", "zero3"):
        for optimizer, bf16, clip in (("sgd", False, None), ("momentum", True, 0.5), ("adam", False, None)):
            off = TrainConfig(bf16=bf16, clip=clip)
            split = TrainConfig(bf16=bf16, clip=clip, deepspeed=stage)
            reference = run(Exact, optimizer, off, alone, {}, 0).state()
            zero = run(Zero, optimizer, split, both, {}, 0).state()
            further = run(Exact, optimizer, off, alone, reference, FIRST)
            resumed = run(Zero, optimizer, split, both, zero, FIRST)
            out = run(Exact, optimizer, off, alone, zero, FIRST)
            losses = zip(further.losses, resumed.losses, strict=True)  # type: ignore[attr-defined]
            row = {
                "stage": stage,
                "optimizer": optimizer,
                "bf16": bf16,
                "apart": apart(reference, zero),
                "resumed": apart(further.state(), resumed.state()),
                "into off": apart(further.state(), out.state()),
                "losses": max(abs(a - b) for a, b in losses),
                "moved": apart(reference, further.state()),
            }
            if rank == 0:
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    os.environ.update(DS_ACCELERATOR="cpu", MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[2], LOCAL_RANK=sys.argv[1])
    main(int(sys.argv[1]))
