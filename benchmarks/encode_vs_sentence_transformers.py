"""Texts to vectors, against sentence-transformers' encode: the same MiniLM folder, the same texts, one thread each.

    python benchmarks/encode_vs_sentence_transformers.py [--json PATH] [--quick]

Pieces of Python's own language reference: `short` of 3 to 12 words, `mixed` of 4 to 40, `long` of 100 to 200, cut at 128
tokens by both sides. float32, and bfloat16 weights. Each side is a process of its own, the peer's in the environment
.venv-peers/sentence-transformers (made on first use: the same versions of torch, transformers and tokenizers), and they take
turns.

- Ours is raysys.nn.encoder.TextEncoder as it is used everywhere: batches of at most 1024 tokens.
- The peer runs with batches of 32, its default, and of 128 texts; the faster of the two counts. It sorts by length, too.
- Both normalise, tokenizing is part of it, and both are warm. Rates are texts per second of processor time of the process, best
  of alternating repetitions: other work on the machine changes that less than time by the clock, which is reported beside it.
- `rel_diff` is the largest difference of any number of the (unit) vectors.
"""

from __future__ import annotations

import argparse
import json
import os
import pydoc_data.topics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
WORDS = {"short": (3, 12), "mixed": (4, 40), "long": (100, 200)}
COUNT = {"short": 512, "mixed": 256, "long": 64}
LENGTH, BATCHES = 128, (32, 128)
GOAL, HOPED = 1.0, 1.5


# ---------------------------------------------------------------- the sides, in processes of their own


def ours() -> Callable[[list[str], bool, int], Any]:
    """Encode with raysys."""
    sys.path.insert(0, str(ROOT))
    from raysys.nn.encoder import TextEncoder
    from raysys.nn.pretrained import load_base

    encoders = {bf16: TextEncoder(load_base(), LENGTH, bf16) for bf16 in (False, True)}
    return lambda texts, bf16, _: encoders[bf16].encode(texts).numpy()


def theirs(folder: str) -> Callable[[list[str], bool, int], Any]:
    """Encode with sentence-transformers."""
    import torch
    from sentence_transformers import SentenceTransformer

    models = {}
    for bf16 in (False, True):
        options = {"dtype": torch.bfloat16 if bf16 else torch.float32}
        models[bf16] = SentenceTransformer(folder, device="cpu", model_kwargs=options)
        models[bf16].max_seq_length = LENGTH

    def encode(texts: list[str], bf16: bool, batch: int) -> Any:
        found = models[bf16].encode(
            texts, batch_size=batch, normalize_embeddings=True, convert_to_tensor=True, show_progress_bar=False
        )
        return found.float().numpy()

    return encode


def work(encode: Callable[[list[str], bool, int], Any]) -> None:
    """Answer requests, one JSON object a line: the case, how; after it the times, and the vectors in a file if asked."""
    print("ready", flush=True)
    for line in sys.stdin:
        ask = json.loads(line)
        texts = json.loads(Path(ask["texts"]).read_text())
        cpu, began = time.process_time(), time.perf_counter()
        vectors = encode(texts, ask["bf16"], ask["batch"])
        told = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - began}
        if ask["out"]:
            np.save(ask["out"], vectors)
        print(json.dumps(told), flush=True)


class Worker:
    """One side, alive until closed."""

    def __init__(self, python: Path | str, *arguments: str) -> None:
        command = [str(python), str(Path(__file__).resolve()), "--side", *arguments]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._read("ready")

    def _read(self, wanted: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(wanted):
                return line
        raise RuntimeError(f"{self.process.args} ended with code {self.process.wait()}")

    def __call__(self, **ask: Any) -> dict[str, float]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(ask) + "\n")
        self.process.stdin.flush()
        return dict(json.loads(self._read("{")))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


# ---------------------------------------------------------------- both


def sample(case: str, count: int) -> list[str]:
    """English texts of that many words each, all different, cut from the language reference."""
    words = " ".join(pydoc_data.topics.topics.values()).split()
    rng, low, high = np.random.default_rng(0), *WORDS[case]
    starts = rng.permutation(len(words) - high)[:count]
    return [" ".join(words[i : i + rng.integers(low, high + 1)]) for i in starts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--quick", action="store_true", help="a quarter of the texts, two repetitions")
    parser.add_argument("--side", nargs="+", metavar="SIDE", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        work(ours() if arguments.side[0] == "ours" else theirs(arguments.side[1]))
        return
    sys.path.insert(0, str(ROOT))
    import peers_st
    import results

    from raysys.nn.pretrained import find_model

    began, repeats = time.monotonic(), 2 if arguments.quick else 3
    sides = {"ours": Worker(sys.executable, "ours"), "peer": Worker(peers_st.python(), "theirs", find_model("minilm"))}
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for case, count in COUNT.items():
            texts = folder / f"{case}.json"
            texts.write_text(json.dumps(sample(case, count // 4 if arguments.quick else count)))
            number = len(json.loads(texts.read_text()))
            for bf16 in (False, True):
                ways = [("ours", 0), *(("peer", batch) for batch in BATCHES)]
                tried: dict[tuple[str, int], list[dict[str, float]]] = {way: [] for way in ways}
                for repetition in range(repeats + 1):
                    for side, batch in ways:
                        out = str(folder / f"{side}-{batch}.npy") if not repetition else ""
                        told = sides[side](texts=str(texts), bf16=bf16, batch=batch, out=out)
                        if repetition:  # the first one warms up and gives the vectors
                            tried[side, batch].append(told)
                best = {
                    way: {k: number / min(t[k] for t in each) for k in ("cpu", "wall")} for way, each in tried.items()
                }
                peer = max(ways[1:], key=lambda way: best[way]["cpu"])
                a, b = (np.load(folder / f"{side}-{batch}.npy") for side, batch in (ways[0], peer))
                mine, other = best[ways[0]], best[peer]
                rows.append(
                    {
                        "case": f"{case} texts, {'bfloat16' if bf16 else 'float32'}", "ours": mine["cpu"], "peer": other["cpu"],
                        "unit": "texts per CPU second", "ratio": mine["cpu"] / other["cpu"],
                        "rel_diff": float(np.abs(a - b).max()), "wall_ratio": mine["wall"] / other["wall"],
                        "ours_wall": mine["wall"], "peer_wall": other["wall"], "peer_batch": peer[1],
                        "ratio_to_its_default_batch": mine["cpu"] / best["peer", BATCHES[0]]["cpu"],
                        "least_cosine": float((a * b).sum(1).min()),
                    }
                )  # fmt: skip
                row = rows[-1]
                print(
                    f"{row['case']:26s} {row['ours']:7.0f} {row['peer']:7.0f} texts per CPU second  x{row['ratio']:5.2f}"
                    f" (by the clock x{row['wall_ratio']:5.2f}; peer's batch {peer[1]})  differ {row['rel_diff']:.1e}",
                    flush=True,
                )
    for side in sides.values():
        side.close()
    goals = [
        {"goal": f"{limit:g} times the rate: {row['case']}", "measured": row["ratio"], "limit": limit,
         "met": row["ratio"] >= limit}
        for limit in (GOAL, HOPED) for row in rows
    ]  # fmt: skip
    result = results.result("sentence-transformers", peers_st.SENTENCE_TRANSFORMERS, rows, began, goals=goals)
    for goal in goals:
        print(f"{'met' if goal['met'] else 'MISSED'}: {goal['goal']}: {goal['measured']:.2f}")
    print(f"geometric mean x{result['geomean_ratio']:.2f}, {result['wall_s']:.0f} s")
    results.write(arguments.json, result)


if __name__ == "__main__":
    main()
