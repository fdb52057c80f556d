"""Serving many LoRA adapters of one model, against peft: swapping adapters, batches per adapter, and peft's own mixed batches.

    python benchmarks/adapters_vs_peft.py [--json PATH] [--quick]

64 adapters (rank 8 on query and value of all 6 layers of all-MiniLM-L6-v2) and a stream of sentences, each for an adapter
drawn at random, from 64 clients that each wait for their answer before they ask again. All sides get the same stream and one
thread for the model. The sentences are those of Python's own language reference: `short` of 3 to 12 words, `mixed` of 4 to 40.

Ours, twice: `model only` calls serve/stack.py, 32 texts at a time; `through Serve` asks the deployment `Model` of
serve/adapters.py by its handle (its own process: queueing, batching and Ray's calls included, HTTP not).
The peer, three times, all adapters loaded once and never from disk again, no serving layer in the way:
- `set_adapter`: PeftModel.set_adapter and one forward pass per request, in order;
- `per group`: the 32 requests at hand are grouped by adapter, one set_adapter and one batch per group;
- `adapter_names`: peft's mixed batch, 32 requests in one forward pass.

`parts` says what the ratio against `set_adapter` consists of, in ms per request: each line differs from the one before by one
thing.
Sides alternate; of three repetitions the fastest counts, its latencies with it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import pydoc_data.topics
import re
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import results
from processes import run

ROOT = Path(__file__).resolve().parent.parent
ADAPTERS, CLIENTS, BATCH, GOAL = 64, 64, 32, 5.0
WORDS = {"short": (3, 12), "mixed": (4, 40)}
LABELS = ["one", "two", "three"]
Engine = Callable[[Sequence[tuple[str, str]]], Any]


def sentences(low: int, high: int, count: int, seed: int = 0) -> list[str]:
    """English sentences of that many words, in random order."""
    text = " ".join(" ".join(pydoc_data.topics.topics.values()).split())
    found = [one for one in re.split(r"(?<=[.:])\s+", text) if low <= len(one.split()) <= high]
    return [found[i] for i in np.random.default_rng(seed).permutation(len(found))[:count]]


def write_adapters(folder: Path, count: int) -> list[str]:
    """A run of adapters with random factors, as jobs write it; their names."""
    import safetensors.torch
    import torch

    from raysys.nn.body import random_head
    from raysys.nn.lora import export_adapter, find_layout
    from raysys.nn.pretrained import load_base
    from raysys.runtime.storage import Storage

    base, storage, generator = load_base(), Storage(folder).join("adapters"), torch.Generator().manual_seed(0)
    layout = find_layout(base.model, (), 0, 8, 16.0)
    names = [f"peer-{i:03d}" for i in range(count)]
    for name in names:
        a, _ = layout.init(generator)
        export_adapter(storage, name, layout, a, 0.05 * torch.randn(layout.size_b, generator=generator), "minilm")
    told = {"format": 1, "model": "minilm", "labels": LABELS, "max_length": 64, "pair": False}
    storage.write_bytes("classifier.json", json.dumps(told).encode())
    head = random_head(len(LABELS), base.width, generator, std=0.1)
    storage.write_bytes("head.safetensors", safetensors.torch.save({"head": head}))
    return names


def drive(engine: Engine, take: int, stream: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Answer a stream with CLIENTS requests waiting at any time, at most `take` of them at once, first come first served."""
    began = time.perf_counter()
    waiting = deque((i, began) for i in range(min(CLIENTS, len(stream))))
    asked, rows, latencies = len(waiting), [], []
    while waiting:
        taken = [waiting.popleft() for _ in range(min(take, len(waiting)))]
        rows += list(engine([stream[i] for i, _ in taken]))
        now = time.perf_counter()
        latencies += [now - since for _, since in taken]
        more = min(len(taken), len(stream) - asked)
        waiting.extend((asked + j, now) for j in range(more))
        asked += more
    return measured(time.perf_counter() - began, latencies, rows)


def measured(seconds: float, latencies: Sequence[float], rows: Sequence[Any]) -> dict[str, Any]:
    """Requests per second, latency percentiles in ms, and the answers."""
    p50, p99 = (1e3 * float(np.percentile(latencies, q)) for q in (50, 99))
    return {"rate": len(rows) / seconds, "p50_ms": p50, "p99_ms": p99, "rows": np.array(rows, float).tolist()}


def best(sides: dict[str, Callable[[], dict[str, Any]]], repeats: int) -> dict[str, dict[str, Any]]:
    """The fastest of the repetitions of each side, the sides alternating."""
    tried: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            tried[name].append(side())
    return {name: max(each, key=lambda one: one["rate"]) for name, each in tried.items()}


# ---------------------------------------------------------------- the sides, in processes of their own


class Peft:
    """All adapters in one PeftModel, and three ways to answer a batch of requests with it."""

    def __init__(self, folder: Path, names: Sequence[str], stack: Any) -> None:
        from peft import PeftModel
        from transformers import AutoModel

        from raysys.nn.pretrained import find_model

        base = AutoModel.from_pretrained(find_model("minilm"))
        self.model = PeftModel.from_pretrained(base, str(folder / "adapters" / names[0]), adapter_name=names[0])
        for name in names[1:]:
            self.model.load_adapter(str(folder / "adapters" / name), name)
        self.model.eval()
        self.tokens, self.head = stack.body.tokens, stack.head

    def forward(self, texts: Sequence[str], **more: Any) -> Any:
        made = self.tokens(texts)
        mask = made["attention_mask"][..., None]
        pooled = (self.model(**made, **more).last_hidden_state * mask).sum(1) / mask.sum(1)
        return (pooled @ self.head.T).double().softmax(-1)

    def set_adapter(self, asks: Sequence[tuple[str, str]]) -> list[list[float]]:
        out = []
        for text, name in asks:
            self.model.set_adapter(name)
            out += self.forward([text]).tolist()
        return out

    def per_group(self, asks: Sequence[tuple[str, str]]) -> list[list[float]]:
        out: list[list[float]] = [[] for _ in asks]
        for name in dict.fromkeys(name for _, name in asks):
            places = [i for i, (_, other) in enumerate(asks) if other == name]
            self.model.set_adapter(name)
            for i, row in zip(places, self.forward([asks[i][0] for i in places]).tolist(), strict=True):
                out[i] = row
        return out

    def adapter_names(self, asks: Sequence[tuple[str, str]]) -> list[list[float]]:
        return self.forward([text for text, _ in asks], adapter_names=[name for _, name in asks]).tolist()


def model_side(folder: Path, streams: dict[str, list[tuple[str, str]]], repeats: int) -> dict[str, Any]:
    """Ours and the three of peft without any serving, in one process."""
    import torch

    from serve import stack as served

    torch.set_num_threads(1)
    stack = served.Stack(str(folder))
    names = stack.artifact.names()
    kept = {name: stack.read(name) for name in names}
    peft = Peft(folder, names, stack)

    def ours(asks: Sequence[tuple[str, str]]) -> list[list[float]]:
        return stack.probabilities([served.Item(text, None, kept[name]) for text, name in asks])

    def padded(asks: Sequence[tuple[str, str]]) -> Any:
        made = stack.body.tokens([text for text, _ in asks])
        a, b = (torch.stack([kept[name][i] for _, name in asks]) for i in (0, 1))
        return (stack.body.pooled_tokens(made, a, b) @ stack.head.T).double().softmax(-1).tolist()

    def one_model(asks: Sequence[tuple[str, str]]) -> Any:
        return peft.forward([asks[0][0]]).tolist()

    out = {}
    with torch.no_grad():
        for case, stream in streams.items():
            sides: dict[str, Callable[[], dict[str, Any]]] = {
                "model only": lambda stream=stream: drive(ours, BATCH, stream),
                "set_adapter": lambda stream=stream: drive(peft.set_adapter, 1, stream),
                "per group": lambda stream=stream: drive(peft.per_group, BATCH, stream),
                "adapter_names": lambda stream=stream: drive(peft.adapter_names, BATCH, stream),
                "no swap": lambda stream=stream: drive(one_model, 1, stream),
                "one by one": lambda stream=stream: drive(ours, 1, stream),
                "padded": lambda stream=stream: drive(padded, BATCH, stream),
            }
            drive(ours, BATCH, stream[:CLIENTS])  # warm
            out[case] = best(sides, repeats)
    return out


def serve_side(folder: Path, streams: dict[str, list[tuple[str, str]]], repeats: int) -> dict[str, Any]:
    """Ours through the handle of the deployment `Model`."""
    import ray
    from ray import serve

    from raysys.runtime.session import Session
    from serve.adapters import build as build_app

    async def clients(handle: Any, stream: Sequence[tuple[str, str]]) -> dict[str, Any]:
        rows: list[Any] = [None] * len(stream)
        latencies, left = [], iter(range(len(stream)))

        async def client() -> None:
            for i in left:
                began = time.perf_counter()
                rows[i] = (await handle.classify.remote([(stream[i][0], None, stream[i][1])]))[0]
                latencies.append(time.perf_counter() - began)

        began = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(CLIENTS)))
        return measured(time.perf_counter() - began, latencies, rows)

    with Session():
        serve.start(proxy_location="Disabled")
        serve.run(build_app({"run": str(folder), "max_batch": BATCH, "guard": {"auth": "none"}}), name="adapters")
        handle = serve.get_deployment_handle("Model", "adapters")
        out = {}
        for case, stream in streams.items():
            asyncio.run(clients(handle, stream[: 2 * ADAPTERS]))  # warm: adapters loaded, routes known
            sides = {"through Serve": lambda stream=stream: asyncio.run(clients(handle, stream))}
            out[case] = best(sides, repeats)
        serve.shutdown()
    ray.shutdown()
    return out


# ---------------------------------------------------------------- both


def measure(side: str, data: Path) -> dict[str, Any]:
    """Run one side in a process of its own."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = run([sys.executable, str(Path(__file__).resolve()), "--side", side, str(data)], {"PYTHONPATH": path})
    print(f"{side}: {done.seconds:.0f} s, peak {done.peak_mb:.0f} MB", flush=True)
    answer: dict[str, Any] = json.loads((data / f"{side}.json").read_text())
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--quick", action="store_true", help="16 adapters, few requests, one repetition")
    parser.add_argument("--side", nargs=2, metavar=("SIDE", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if arguments.side:
        side, data = arguments.side[0], Path(arguments.side[1])
        ask = json.loads((data / "ask.json").read_text())
        streams = {case: [tuple(one) for one in stream] for case, stream in ask["streams"].items()}
        answer = (model_side if side == "model" else serve_side)(data / "run", streams, ask["repeats"])
        (data / f"{side}.json").write_text(json.dumps(answer))
        return
    import peft

    began = time.monotonic()
    adapters, count, repeats = (16, 96, 1) if arguments.quick else (ADAPTERS, 128, 3)
    with tempfile.TemporaryDirectory() as name:
        data, rng = Path(name), np.random.default_rng(1)
        names = write_adapters(data / "run", adapters)
        streams = {
            case: [(text, names[rng.integers(adapters)]) for text in sentences(low, high, count)]
            for case, (low, high) in WORDS.items()
        }
        (data / "ask.json").write_text(json.dumps({"streams": streams, "repeats": repeats}))
        model, through = measure("model", data), measure("serve", data)
    rows, parts = [], []
    for case in WORDS:
        one = model[case] | through[case]
        for ours in ("model only", "through Serve"):
            for peer in ("set_adapter", "per group", "adapter_names"):
                mine, theirs = one[ours], one[peer]
                differs = float(np.abs(np.array(mine["rows"]) - np.array(theirs["rows"])).max())
                rows.append(
                    {
                        "case": f"{case} texts, {ours} against {peer}", "ours": mine["rate"], "peer": theirs["rate"],
                        "unit": "requests/s", "ratio": mine["rate"] / theirs["rate"], "rel_diff": differs,
                        "ours_p50_ms": mine["p50_ms"], "ours_p99_ms": mine["p99_ms"],
                        "peer_p50_ms": theirs["p50_ms"], "peer_p99_ms": theirs["p99_ms"],
                    }
                )  # fmt: skip
        steps = {
            "set_adapter and one forward pass (peft)": "set_adapter", "one forward pass, never swapped (peft)": "no swap",
            "one forward pass (ours)": "one by one", f"{BATCH} at once, padded (ours)": "padded",
            f"{BATCH} at hand, cut into passes of like lengths (ours)": "model only",
        }  # fmt: skip
        parts += [
            {"texts": case, "what": what, "ms_per_request": 1e3 / one[side]["rate"]} for what, side in steps.items()
        ]
    goals = [
        {
            "goal": f"{GOAL:g} times the requests of set_adapter per request: {row['case']}", "measured": row["ratio"],
            "limit": GOAL, "met": row["ratio"] >= GOAL,
        }
        for row in rows if row["case"].endswith("against set_adapter")
    ]  # fmt: skip
    result = results.result("peft", peft.__version__, rows, began, adapters=adapters, parts=parts, goals=goals)
    for row in rows:
        print(
            f"{row['case']:52s} {row['ours']:7.1f} {row['peer']:7.1f} requests/s  x{row['ratio']:5.2f}  p50/p99 "
            f"{row['ours_p50_ms']:5.0f}/{row['ours_p99_ms']:5.0f} and {row['peer_p50_ms']:5.0f}/{row['peer_p99_ms']:5.0f} ms"
            f"  differ {row['rel_diff']:.1e}"
        )
    for part in parts:
        print(f"{part['texts']:6s} {part['ms_per_request']:7.2f} ms per request: {part['what']}")
    for goal in goals:
        print(f"{'met' if goal['met'] else 'MISSED'}: {goal['goal']}: {goal['measured']:.2f}")
    print(f"{result['wall_s']:.0f} s")
    results.write(arguments.json, result)


if __name__ == "__main__":
    main()
