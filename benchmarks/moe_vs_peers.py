"""Forward and backward of our mixture of experts against DeepSpeed's and Hugging Face's, with the same weights.

    python benchmarks/moe_vs_peers.py [--json PATH] [--quick]

64 experts, 4 active, width 256, 4096 tokens, float32, softmax scores and renormalised gates, no shared expert, no balancing: what
all of them can do. Experts of inner width 128 (fine-grained, as OLMoE's: half the width), and 512 on one thread. Peers:
- `deepspeed`: deepspeed.moe.layer.MoE without capacity (drop_tokens=False);
- `mixtral`, `olmoe`: the sparse blocks of transformers with each `experts_implementation`: eager (what a block built by hand
  does), grouped_mm (what `from_pretrained` chooses), batched_mm (mixtral's, width 128 only: it copies weights per assignment,
  4 GB of them; a sixteenth of the tokens, on all sides).
`limit` is the time of the routed work's matrix products alone, six per expert of 256 rows, by torch.mm on tensors that are
there already: nothing in float32 by the same products can be faster, so `limit_ratio` is the largest ratio there could be.

1 thread: processor time. 2 threads: wall time (with others on the machine it is theirs too; see `load`). Sides take turns; the
fastest of the repetitions counts. `rel_diff`: the largest difference of outputs and of input gradients, over the largest output.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import results
import torch
from aggregation_vs_byzfl import ROOT

WIDTH, EXPERTS, ACTIVE, TOKENS, GOAL = 256, 64, 4, 4096, 3.0
INNER = (128, 512)
REPETITIONS = 5
Side = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def run(layer: Any, x: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The layer's output (N, D) and gradient of its input (N, D), for a gradient `up` of the output."""
    layer.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    y = layer(x)
    y = y[0] if isinstance(y, tuple) else y
    y.reshape(up.shape).backward(up)
    return y.detach().reshape(up.shape), x.grad.reshape(up.shape)


def hugging_face(moe: Any, kind: str, implementation: str) -> Any:
    """The sparse block of Mixtral or OLMoE with the weights of ours."""
    from transformers import MixtralConfig, OlmoeConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

    told = {"hidden_size": WIDTH, "intermediate_size": moe.w_out.shape[1], "num_experts_per_tok": ACTIVE}
    if kind == "mixtral":
        config: Any = MixtralConfig(num_local_experts=EXPERTS, **told)
    else:
        config = OlmoeConfig(num_experts=EXPERTS, norm_topk_prob=True, **told)
    config._experts_implementation = implementation
    block = MixtralSparseMoeBlock(config) if kind == "mixtral" else OlmoeSparseMoeBlock(config)
    with torch.no_grad():
        block.gate.weight.copy_(moe.router)
        block.experts.gate_up_proj.copy_(moe.w_in.transpose(1, 2))
        block.experts.down_proj.copy_(moe.w_out.transpose(1, 2))
    return block


def products(moe: Any, tokens: int) -> Callable[[], None]:
    """The matrix products of the routed experts, forward and backward, if each expert had the same number of rows."""
    rows, (experts, inner, _) = tokens * ACTIVE // EXPERTS, moe.w_out.shape
    x = [torch.randn(rows, WIDTH) for _ in range(experts)]
    act = [torch.randn(rows, inner) for _ in range(experts)]
    h = [torch.randn(rows, 2 * inner) for _ in range(experts)]
    w_in, w_out = moe.w_in.detach(), moe.w_out.detach()
    d_in, d_out = torch.empty_like(w_in), torch.empty_like(w_out)
    outs = torch.empty(rows, 2 * inner), torch.empty(rows, WIDTH), torch.empty(rows, inner)

    def multiply() -> None:
        for e in range(experts):
            torch.mm(x[e], w_in[e], out=outs[0])
            torch.mm(act[e], w_out[e], out=outs[1])
            torch.mm(x[e], w_out[e].T, out=outs[2])
            torch.mm(act[e].T, x[e], out=d_out[e])
            torch.mm(x[e].T, h[e], out=d_in[e])
            torch.mm(h[e], w_in[e].T, out=outs[1])

    return multiply


def timed(sides: dict[str, Callable[[], Any]], threads: int, repetitions: int) -> dict[str, float]:
    """Seconds of each side: the fastest of the repetitions."""
    clock = time.process_time if threads == 1 else time.perf_counter
    torch.set_num_threads(threads)
    best = dict.fromkeys(sides, float("inf"))
    for repetition in range(repetitions + 1):
        for name, side in sides.items():
            began = clock()
            side()
            if repetition:  # the first warms up
                best[name] = min(best[name], clock() - began)
    return best


def measure(inner: int, tokens: int, peers: tuple[str, ...], threads: int, repetitions: int) -> list[dict[str, Any]]:
    """A row for each peer."""
    from raysys.nn.deepspeed_moe import DeepSpeedMoE
    from raysys.nn.moe import MoE

    torch.manual_seed(0)
    moe = MoE(WIDTH, EXPERTS, ACTIVE, inner, 0, score="softmax", balanced=False)
    x, up = torch.randn(1, tokens, WIDTH), torch.randn(tokens, WIDTH)
    layers = {
        name: DeepSpeedMoE.of(moe).layer if name == "deepspeed" else hugging_face(moe, *name.split()) for name in peers
    }
    y, gradient = run(moe, x[0], up)
    differs = {}
    for name, layer in layers.items():
        z, theirs = run(layer, x, up)
        differs[name] = float(max((y - z).abs().max(), (gradient - theirs).abs().max()) / y.abs().max())
    sides: dict[str, Callable[[], Any]] = {name: partial(run, layer, x, up) for name, layer in layers.items()}
    seconds = timed(
        {"ours": partial(run, moe, x[0], up), "limit": products(moe, tokens), **sides}, threads, repetitions
    )
    flops = 18 * tokens * ACTIVE * WIDTH * inner
    print(
        f"inner {inner}, {tokens} tokens, {threads} threads: ours {1e3 * seconds['ours']:.1f} ms,"
        f" products alone {1e3 * seconds['limit']:.1f} ms ({flops / seconds['limit'] / 1e9:.0f} Gflop/s)", flush=True,
    )  # fmt: skip
    rows = []
    for name in peers:
        row = {
            "case": f"{name}, inner {inner}, {tokens} tokens, {threads} thread{'s' * (threads > 1)}",
            "ours": 1 / seconds["ours"], "peer": 1 / seconds[name], "unit": "passes/CPU-s" if threads == 1 else "passes/s",
            "ratio": seconds[name] / seconds["ours"], "rel_diff": differs[name], "limit_ratio": seconds[name] / seconds["limit"],
            "ours_over_limit": seconds["ours"] / seconds["limit"],
        }  # fmt: skip
        rows.append(row)
        print(
            f"  {name:18s} {1e3 * seconds[name]:8.1f} ms  x{row['ratio']:6.2f}  (at the limit x{row['limit_ratio']:5.2f})"
            f"  differs by {row['rel_diff']:.1e}", flush=True,
        )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument(
        "--quick", action="store_true", help="inner width 128, one thread, two repetitions, no batched_mm"
    )
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    import deepspeed
    import transformers

    began = time.monotonic()
    peers = ("deepspeed", "mixtral eager", "mixtral grouped_mm", "olmoe eager", "olmoe grouped_mm")
    rows = []
    for inner in INNER[: 1 if arguments.quick else 2]:
        for threads in (1,) if arguments.quick or inner > INNER[0] else (1, 2):
            rows += measure(inner, TOKENS, peers, threads, 2 if arguments.quick else REPETITIONS)
    if not arguments.quick:
        rows += measure(INNER[0], TOKENS // 16, ("mixtral batched_mm",), 1, REPETITIONS)
    goals = [
        {
            "goal": f"{GOAL:g} times as fast: {r['case']}",
            "measured": r["ratio"],
            "limit": GOAL,
            "met": r["ratio"] >= GOAL,
        }
        for r in rows
    ]
    for goal in goals:
        print(f"{'met' if goal['met'] else 'MISSED'}: {goal['goal']}: {goal['measured']:.2f}")
    version = f"deepspeed {deepspeed.__version__}, transformers {transformers.__version__}"
    results.write(arguments.json, results.result("MoE layers", version, rows, began, goals=goals))


if __name__ == "__main__":
    main()
