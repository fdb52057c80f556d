"""Rounds of federated adapters of a language model, against Flower's own simulation engine. Both in one run, on the same machine.

    python benchmarks/tad_lora_vs_flower.py [--json PATH] [--quick]

Ten clients, all of them in every round; MiniLM with adapters of rank 8 on query and value of the top two layers, the grammar
task, ten local steps of AdamW on four texts; the same texts, division, start and batches (tad_lora_flower_app.py draws them from
the same seeds). Flower averages A and B over all clients (FedAvg); ours is method lora over topology complete: the same mean.

- Ours is the job itself: `jobs.tad_lora.peer_to_peer` over Ray actors that exchange references, barriers and messages' checks
  included, five clients to a batch. There is no server, and each peer mixes for itself.
- Flower's is one process per core in which clients take turns, its current Message API, transformers and peft, in the virtual
  environment .venv-peers/flower, made or completed on first use. Two ways to pad: to the longest text of a batch, and to the
  paper's length of 128 as public scripts do; the tokens are the same.
- decentralizepy, the peer-to-peer framework nearest to this, is not on PyPI and cannot be installed here: not measured.
- Neither side evaluates while it is timed. Seconds per round count from the end of the warm-up, by the clock and in processor
  time of all processes. `total` runs from starting the process to the end of the last of Flower's rounds, on both sides; `start`
  to the end of the first round (`total` less the others: several of ours are under way at once), for ours with the one-off pass
  of all texts through the lower layers.
- After Flower's rounds the adapters are compared: their accuracy, and how far they lie apart relative to how far they moved
  (Adam's first steps have the same size whatever the gradient's, so rounding does show).
With --repetitions sides alternate and the best one counts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "disabled")

import numpy as np
import results
from aggregation_vs_byzfl import ROOT
from cputime import cpu_seconds
from processes import run
from rounds_vs_flower import FLOWER, NEVER, SCIKIT_LEARN, flower_python

PEERS, STEPS, BATCH, LR, SEED, EXAMPLES, TESTED = 10, 10, 4, 2e-3, 0, 1000, 400
BARRIER = 5
"""Rounds between our barriers: everything has arrived at one, so times taken there are of whole rounds."""
OUR_ROUNDS, PEER_ROUNDS, PEER_WARM_UP = 25, 5, 1
PADDING = {"padded to the batch's longest": 0, "padded to 128": 128}
GOAL = 5.0


def config(ask: dict[str, Any], out: str) -> Any:
    """The job's configuration."""
    from jobs.tad_lora import TrainConfig

    return TrainConfig.of(
        {
            "out": out, "wandb": False, "data": "grammar(difficulty=0.3)", "method": "lora", "beside": [],
            "topology": "complete", "evaluate_every": NEVER, "block": -(-ask["peers"] // len(os.sched_getaffinity(0))),
            "cluster": {"snapshot_every": BARRIER},
            **{key: ask[key] for key in ("peers", "steps", "batch", "lr", "seed", "examples", "test", "rounds")},
        }
    )  # fmt: skip


# ---------------------------------------------------------------- our side, a process of its own


def ours(folder: Path) -> None:
    """Time the job's loop; keep the factors after Flower's rounds."""
    from jobs.tad_lora import peer_to_peer
    from raysys.runtime.rounds import Rounds
    from raysys.runtime.run import Run
    from raysys.runtime.session import Session
    from raysys.systems.tad_lora.task import Task

    ask = json.loads((folder / "problem.json").read_text())
    c = config(ask, str(folder / "runs"))
    task = Task(c.arm("lora"), c.seed)
    stamps: list[float] = []
    cpu: list[float] = []
    kept: list[dict[str, np.ndarray]] = []

    class Timed(Rounds):
        """Notes when each round is submitted, at barriers when all before are done; measures nothing."""

        def due(self, t: int) -> bool:
            return False

        def _note(self) -> None:
            stamps.append(time.monotonic())
            cpu.append(cpu_seconds(os.getpid()))

        def __iter__(self) -> Iterator[int]:
            for t in super().__iter__():
                self._note()
                if t == ask["peer_rounds"]:
                    kept.extend(state for _, state in self.participants[0].snapshot())
                yield t
            self._note()

    with Session(c.cluster) as session, Run.open(c, system="tad_lora", command="train") as opened:
        stage = opened.stage("timed")
        loop = partial(Timed, stage, ask["rounds"], snapshot_every=BARRIER, log_every=NEVER)
        peer_to_peer(task, loop, session, c.block)
    a, b = (np.concatenate([state[name] for state in kept]) for name in ("a", "b"))
    np.savez(folder / "ours.npz", stamps=stamps, cpu=cpu, a=a, b=b)


# ---------------------------------------------------------------- both sides


def python_with_peft() -> Path:
    """The Python of .venv-peers/flower with transformers and peft of our own versions.

    Raises:
        RuntimeError: pip cannot install them.
    """
    from importlib.metadata import version

    python = flower_python()
    wanted = [f"{name}=={version(name)}" for name in ("transformers", "peft")]
    asked = "from importlib.metadata import version as v; print(*(f'{n}=={v(n)}' for n in ('transformers', 'peft')))"
    found = subprocess.run([str(python), "-c", asked], capture_output=True, text=True, check=False)
    if found.stdout.split() != wanted:
        install = [str(python), "-m", "pip", "install", "-q", *wanted, f"scikit-learn=={SCIKIT_LEARN}"]
        done = subprocess.run(install, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"pip install {' '.join(wanted)}: {done.stderr.strip().splitlines()[-1]}")
    return python


def write_problem(folder: Path, ask: dict[str, Any]) -> Any:
    """What Flower's clients need: tokenised texts, labels, division, head, start. Returns our task."""
    from raysys.nn.pretrained import find_model, load_base
    from raysys.systems.tad_lora.task import Task

    task = Task(config(ask, ".").arm("lora"), ask["seed"])
    train, tokenizer = task.texts[0], load_base(task.setting.model).tokenizer
    made = tokenizer(list(train.first), truncation=True, max_length=task.setting.max_length, padding=True)
    arrays: dict[str, Any] = {f"texts.{key}": np.array(value) for key, value in made.items()}
    arrays |= {f"start.{key}": value for key, value in named(task, *(x.numpy() for x in task.start(-1))).items()}
    cuts = np.cumsum([len(part) for part in task.division])[:-1]
    arrays |= {"y": train.y, "indices": np.concatenate(task.division), "cuts": cuts, "head": task.head.numpy()}
    np.savez(folder / "problem.npz", **arrays)
    s, depth = task.setting, load_base(task.setting.model).model.config.num_hidden_layers
    more = {"model": find_model(s.model), "rank": s.rank, "alpha": s.alpha, "layers": list(range(depth))[-s.layers :]}
    (folder / "problem.json").write_text(json.dumps(ask | more))
    return task


def named(task: Any, a: np.ndarray, b: np.ndarray) -> dict[str, np.ndarray]:
    """Flat factors by the names that peft gives them."""
    import torch

    from raysys.nn.lora import PREFIX

    layout = task.layout
    parts = {"A": layout.split_a(torch.from_numpy(a)), "B": layout.split_b(torch.from_numpy(b))}
    return {
        f"{PREFIX}{module}.lora_{kind}.weight": part[i].numpy()
        for i, module in enumerate(layout.modules)
        for kind, part in parts.items()
    }


def values(pad_to: int, quick: bool) -> dict[str, Any]:
    """What both sides are told."""
    size = {"peers": 4, "steps": 2, "examples": 200, "rounds": 10} if quick else {}
    return {
        "peers": PEERS, "steps": STEPS, "examples": EXAMPLES, "rounds": OUR_ROUNDS, "batch": BATCH, "lr": LR, "seed": SEED,
        "test": TESTED, "peer_rounds": PEER_ROUNDS, "pad_to": pad_to, **size,
    }  # fmt: skip


def per_round(seen: np.ndarray, warm_up: int) -> float:
    """Seconds a round takes after the warm-up; `seen` (R + 1,) is a clock before the first round and after each."""
    return float(seen[-1] - seen[warm_up]) / (len(seen) - 1 - warm_up)


def measure(side: str, folder: Path, ask: dict[str, Any], python: Path) -> dict[str, Any]:
    """Run one side and read what it saved."""
    file = "tad_lora_flower_app.py" if side == "flower" else "tad_lora_vs_flower.py"
    command = [str(python), str(Path(__file__).with_name(file)), *([] if side == "flower" else ["--ours"]), str(folder)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = run(command, {"PYTHONPATH": path})
    with np.load(folder / f"{side}.npz") as saved:
        out = {key: saved[key] for key in saved.files}
    warm_up, last = (PEER_WARM_UP if side == "flower" else BARRIER), ask["peer_rounds"]
    round_s, total_s = per_round(out["stamps"], warm_up), out["stamps"][last] - done.started
    result = {
        "round_s": round_s, "cpu_s": per_round(out["cpu"], warm_up),
        "start_s": total_s - (last - 1) * round_s, "total_s": total_s,
        "total_cpu_s": out["cpu"][last], "peak_mb": done.peak_mb, **out,
    }  # fmt: skip
    print(
        f"  {side:7s} {result['round_s']:6.2f} s/round ({result['cpu_s']:6.2f} of the processors), start "
        f"{result['start_s']:5.1f} s, {last} rounds in {result['total_s']:5.1f} s, peak {done.peak_mb:5.0f} MB",
        flush=True,
    )
    return result


def adapters(task: Any, side: str, out: dict[str, Any]) -> np.ndarray:
    """(n, size_a + size_b) every peer's factors after the compared rounds; n = 1 for Flower's server."""
    if side == "ours":
        return np.concatenate([out["a"], out["b"]], 1)
    layout = task.layout
    names = named(task, np.zeros(layout.size_a, np.float32), np.zeros(layout.size_b, np.float32))
    return np.concatenate([out[f"last.{key}"].ravel() for kind in "AB" for key in names if f"lora_{kind}" in key])[None]


def accuracy(task: Any, factors: np.ndarray) -> float:
    """Mean test accuracy of some peers' models."""
    import torch

    a, b = torch.from_numpy(factors).split([task.layout.size_a, task.layout.size_b], dim=1)
    return float(task.learner.evaluate(np.arange(len(factors)), a.contiguous(), b.contiguous(), None).mean())


def compare(paddings: dict[str, int], python: Path, repetitions: int, quick: bool) -> list[dict[str, Any]]:
    """All repetitions of our side and of Flower's with each padding; one row for each padding."""
    order: list[tuple[str, int]] = [("ours", 0), *paddings.items()]
    seen: dict[str, list[dict[str, Any]]] = {label: [] for label, _ in order}
    for repetition in range(repetitions):
        for label, pad_to in order[:: 1 if repetition % 2 == 0 else -1]:
            side = "ours" if label == "ours" else "flower"
            with tempfile.TemporaryDirectory() as name:
                task = write_problem(Path(name), values(pad_to, quick))
                interpreter = Path(sys.executable) if side == "ours" else python
                seen[label].append(measure(side, Path(name), values(pad_to, quick), interpreter))
    return [compared(task, label, seen["ours"], seen[label]) for label in paddings]


def compared(task: Any, label: str, ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> dict[str, Any]:
    """One case from its repetitions."""
    best = {"ours": min(ours, key=lambda r: r["round_s"]), "flower": min(theirs, key=lambda r: r["round_s"])}
    final = {side: adapters(task, side, out) for side, out in best.items()}
    our_mean, server = final["ours"].mean(0).astype(np.float64), final["flower"][0].astype(np.float64)
    start = np.concatenate([x.numpy() for x in task.start(-1)])
    s = task.setting
    found: dict[str, Any] = {
        "case": f"{s.peers} clients, {s.steps} local steps, {label}",
        "ours": 1 / best["ours"]["round_s"], "peer": 1 / best["flower"]["round_s"], "unit": "rounds/s",
        "ratio": best["flower"]["round_s"] / best["ours"]["round_s"],
        "cpu_ratio": best["flower"]["cpu_s"] / best["ours"]["cpu_s"],
        "total_ratio": min(r["total_s"] for r in theirs) / min(r["total_s"] for r in ours),
        "rel_diff": float(np.linalg.norm(our_mean - server) / np.linalg.norm(server - start)),
        "compared_rounds": PEER_ROUNDS,
    }  # fmt: skip
    for name, side, each in (("ours", "ours", ours), ("peer", "flower", theirs)):
        found[f"{name}_accuracy"] = accuracy(task, final[side])
        for key in ("round_s", "cpu_s", "start_s", "total_s", "total_cpu_s", "peak_mb"):
            found[f"{name}_{key}"] = (max if key == "peak_mb" else min)(float(r[key]) for r in each)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument(
        "--quick", action="store_true", help="few clients and steps, one way of padding, one repetition"
    )
    parser.add_argument("--repetitions", type=int, default=1, help="of each case, sides alternating")
    parser.add_argument("--ours", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if arguments.ours:
        ours(arguments.ours)
        return
    began = time.monotonic()
    python = python_with_peft()
    cases = dict(list(PADDING.items())[: 1 if arguments.quick else None])
    rows = compare(cases, python, arguments.repetitions, arguments.quick)
    goals = [
        {"goal": f"{GOAL:g} times the rounds: {row['case']}", "measured": row["ratio"], "limit": GOAL,
         "met": row["ratio"] >= GOAL}
        for row in rows
    ]  # fmt: skip
    result = results.result("flwr[simulation]", FLOWER, rows, began, goals=goals)
    for row in rows:
        print(
            f"{row['case']}: x{row['ratio']:.1f} rounds (x{row['cpu_ratio']:.1f} by processor time), x{row['total_ratio']:.1f}"
            f" from start to end of round {row['compared_rounds']}\n    memory {row['ours_peak_mb']:.0f} / "
            f"{row['peer_peak_mb']:.0f} MB, accuracy {row['ours_accuracy']:.4f} / {row['peer_accuracy']:.4f}, adapters "
            f"differ by {row['rel_diff']:.1e}"
        )
    for goal in goals:
        print(f"{'met' if goal['met'] else 'MISSED'}: {goal['goal']}: {goal['measured']:.2f}")
    print(f"{result['wall_s']:.0f} s")
    results.write(arguments.json, result)


if __name__ == "__main__":
    main()
