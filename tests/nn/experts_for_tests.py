"""A mixture of experts in one process and shared out over two joined by gloo: prints how far apart they are.

python experts_for_tests.py RANK PORT     one JSON line per case, from each rank
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from raysys.nn.moe import MoE

WIDTH, EXPERTS, ACTIVE = 16, 8, 3
CASES = {
    "even": (20, 20),
    "uneven": (33, 5),
    "nothing here": (0, 21),
    "nothing there": (12, 0),
    "nothing at all": (0, 0),
}
"""Tokens of each rank."""


def layer() -> MoE:
    torch.manual_seed(0)
    return MoE(WIDTH, EXPERTS, ACTIVE, 6, 10)


def tokens(n: int, rank: int) -> Tensor:
    return torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(rank)).requires_grad_()


def apart(a: Tensor, b: Tensor) -> float:
    return float((a.detach().float() - b.detach().float()).abs().max()) if a.numel() else 0.0


def case(name: str, rank: int, bf16: bool, **routing: Any) -> dict[str, Any]:
    """Every rank computes all tokens alone, and its own ones together with the other."""
    alone, shared = layer(), layer()
    cut = shared.shard(rank, 2, None)
    assert [p is q for p, q in zip(cut, (shared.w_in, shared.w_out), strict=True)] == [True, True]
    assert shared.w_in.shape[0] == EXPERTS // 2
    all_x = [tokens(n, r) for r, n in enumerate(CASES[name])]
    x = tokens(CASES[name][rank], rank)
    if routing.get("narrow"):  # all to the experts of rank 0, one each
        allowed = torch.arange(EXPERTS) < 2
        options = [
            {"allowed": allowed.expand(len(t), -1), "active": torch.ones(len(t), dtype=torch.int64)} for t in all_x
        ]
    else:
        options = [{} for _ in all_x]
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        expected = [alone(t, **o) for t, o in zip(all_x, options, strict=True)]
        y, _ = shared(x, **options[rank])
    sum((e[0].square() * 3).sum() for e in expected).backward()  # type: ignore[union-attr]
    (y.square() * 3).sum().backward()
    for p in shared.parameters():
        if not any(p is q for q in cut):
            assert p.grad is not None
            dist.all_reduce(p.grad)
    whole = {name: p.grad for name, p in alone.named_parameters()}
    own = slice(rank * EXPERTS // 2, (rank + 1) * EXPERTS // 2)
    grads = {
        name: apart(p.grad, whole[name][own] if name in ("w_in", "w_out") else whole[name])  # type: ignore[arg-type, index]
        for name, p in shared.named_parameters()
        if name != "bias"
    }
    home = [(e[1].experts >= 0) & (e[1].experts // (EXPERTS // 2) == r) for r, e in enumerate(expected)]
    used = [(e[1].experts >= 0).sum() for e in expected]
    away = int(used[rank] - home[rank].sum())  # A of the closed form
    visiting = int(used[1 - rank] - home[1 - rank].sum())  # B
    assert shared.parallel is not None
    return {
        "case": name, "rank": rank, "bf16": bf16, "output": apart(y, expected[rank][0]), "input": apart(x.grad, all_x[rank].grad),
        "gradients": max(grads.values()), "bias": apart(shared.bias.grad * 2.0**40, alone.bias.grad * 2.0**40),
        "traffic": dict(shared.parallel.traffic), "away": away, "visiting": visiting, "size": 2 if bf16 else 4,
    }  # fmt: skip


def main(rank: int) -> None:
    dist.init_process_group("gloo", rank=rank, world_size=2)
    for name in CASES:
        print(json.dumps(case(name, rank, False)), flush=True)
    print(json.dumps(case("uneven", rank, False, narrow=True)), flush=True)
    print(json.dumps(case("uneven", rank, True)), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[2])
    main(int(sys.argv[1]))
