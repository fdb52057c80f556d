"""Rounds per second of federated averaging, against Flower's own simulation engine. Both in one run, on the same machine.

    python benchmarks/rounds_vs_flower.py [--json PATH] [--quick]

100 clients, all of them in every round; an MLP 64-32-10 on scikit-learn's digits; the same division of the examples, the same
start, the same batches (flower_app.py draws them from the same seeds) and the same local steps, so both sides compute the
same models up to rounding: the accuracy after every round and the final parameters are compared.

- Ours is the job itself: `jobs.byzantine.with_server` over Ray actors, barriers and messages' checks included, rule `mean`,
  no Byzantine clients, clients of a host stepped together. Flower's is its current Message API with its FedAvg, in a virtual
  environment of its own, .venv-peers/flower, made on first use.
- Neither side evaluates while it is timed. The rate counts from the end of the warm-up; `start` is the time from starting
  the process to the end of its first round; `total` that to the end of the last of Flower's rounds, on both sides.
- Sides alternate (ours-theirs, theirs-ours); the best repetition of each counts. Memory: see processes.py.
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
from aggregation_vs_byzfl import PEERS, ROOT, TORCH
from processes import run

FLOWER, SCIKIT_LEARN = "1.42.0", "1.9.1"
WORKERS, HIDDEN, BATCH, L2, SEED = 100, 32, 16, 1e-3, 0
STEPS = {1: 0.5, 5: 0.2}
"""Local steps -> local step size."""
OUR_WARM_UP, OUR_ROUNDS = 50, 450
PEER_WARM_UP, PEER_ROUNDS = 3, 20
NEVER = 10**9


def values(steps: int, peer_rounds: int, peer_cpus: float) -> dict[str, Any]:
    """What both sides are told."""
    return {
        "workers": WORKERS, "hidden": HIDDEN, "classes": 10, "batch": BATCH, "l2": L2, "seed": SEED, "local_steps": steps,
        "local_lr": STEPS[steps], "peer_rounds": peer_rounds, "peer_cpus": peer_cpus,
    }  # fmt: skip


# ---------------------------------------------------------------- our side, a process of its own


def config(ask: dict[str, Any], out: str) -> Any:
    """The job's configuration: a server step of local_lr * local_steps is FedAvg."""
    from jobs.byzantine import TrainConfig

    hosts = len(os.sched_getaffinity(0))
    return TrainConfig.of(
        {
            "out": out, "wandb": False, "data": "digits", "problem": "mlp", "partition": "dirichlet(1)", "byzantine": 0,
            "attack": "none", "rule": "mean", "momentum_at": "none", "lr": ask["local_lr"] * ask["local_steps"],
            "lr_decay": 1.0, "rounds": OUR_ROUNDS, "block": -(-ask["workers"] // hosts),
            **{k: ask[k] for k in ("workers", "hidden", "batch", "l2", "local_steps", "local_lr")},
        }
    )  # fmt: skip


def ours(folder: Path) -> None:
    """Time the job's loop; then run it again for Flower's rounds, measuring after every round."""
    from jobs.byzantine import with_server
    from raysys.runtime.rounds import Rounds
    from raysys.runtime.run import Run
    from raysys.runtime.session import Session
    from raysys.systems.byzantine.task import Task

    stamps: list[float] = []

    class Timed(Rounds):
        """Notes when each round is submitted, by when all but the newest few before it are done; measures nothing."""

        def due(self, t: int) -> bool:
            return False

        def __iter__(self) -> Iterator[int]:
            for t in super().__iter__():
                stamps.append(time.monotonic())
                yield t
            stamps.append(time.monotonic())

    ask = json.loads((folder / "problem.json").read_text())
    c = config(ask, str(folder / "runs"))
    task = Task(c.arms()["robust"][1], ask["seed"])
    every = c.cluster.snapshot_every
    with Session(c.cluster) as session, Run.open(c, system="byzantine", command="train") as folder_of_run:
        stage = folder_of_run.stage("timed")
        with_server(task, partial(Timed, stage, OUR_ROUNDS, snapshot_every=every, log_every=NEVER), session, 1)
        stage = folder_of_run.stage("curve")
        loop = partial(Rounds, stage, ask["peer_rounds"], snapshot_every=every, log_every=1)
        final, _ = with_server(task, loop, session, 1)
        accuracy = [row["accuracy"] for row in folder_of_run.metrics.rows("curve")]
    np.savez(folder / "ours.npz", stamps=stamps, accuracy=accuracy, final=final)


# ---------------------------------------------------------------- both sides


def flower_python() -> Path:
    """The Python of .venv-peers/flower, made and filled if it is not there.

    Raises:
        RuntimeError: pip cannot install it.
    """
    python = PEERS / "flower" / "bin" / "python"
    asked = [str(python), "-c", "import flwr.simulation, ray, sklearn; from importlib.metadata import version as v;"
             "print(v('flwr'))"]  # fmt: skip
    if python.exists() and subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip() == FLOWER:
        return python
    print(f"making {PEERS / 'flower'} with flwr {FLOWER}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(PEERS / "flower")], check=True)
    install = [str(python), "-m", "pip", "install", "-q"]
    others = [f"torch=={TORCH}", f"scikit-learn=={SCIKIT_LEARN}"]
    plain = subprocess.run([*install, f"flwr[simulation]=={FLOWER}", *others], capture_output=True, check=False)
    if plain.returncode:
        # An index that lags behind may lack what the newest version asks for in its smallest print (certifi): take the
        # dependencies of the newest version that installs.
        for step in ([f"flwr[simulation]<={FLOWER}", *others], ["--no-deps", f"flwr=={FLOWER}"]):
            done = subprocess.run([*install, *step], capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"pip install {' '.join(step)}: {done.stderr.strip().splitlines()[-1]}")
    return python


def write_problem(folder: Path, ask: dict[str, Any]) -> None:
    """What Flower's clients need of the task: examples, division, start."""
    from raysys.systems.byzantine.task import Task

    task = Task(config(ask, ".").arms()["robust"][1], ask["seed"])
    parts, train = task.partition.indices, task.dataset.train
    cuts = np.cumsum([len(part) for part in parts])[:-1]
    start = task.problem.init().numpy()
    np.savez(folder / "problem.npz", x=train.x, y=train.y, indices=np.concatenate(parts), cuts=cuts, start=start)
    (folder / "problem.json").write_text(json.dumps(ask))


def accuracies(ask: dict[str, Any], models: np.ndarray) -> np.ndarray:
    """Test accuracy of each model (R, d)."""
    import torch

    from raysys.systems.byzantine.task import Task

    problem = Task(config(ask, ".").arms()["robust"][1], ask["seed"]).problem
    return np.array([problem.score(torch.from_numpy(m))["accuracy"] for m in models])


def rate(stamps: np.ndarray, warm_up: int) -> float:
    return (len(stamps) - 1 - warm_up) / (stamps[-1] - stamps[warm_up])


def measure(side: str, folder: Path, ask: dict[str, Any], python: Path) -> dict[str, Any]:
    """Run one side and read what it saved."""
    file = "flower_app.py" if side == "flower" else "rounds_vs_flower.py"
    command = [str(python), str(Path(__file__).with_name(file)), *([] if side == "flower" else ["--ours"]), str(folder)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = run(command, {"PYTHONPATH": path})
    with np.load(folder / f"{side}.npz") as saved:
        out = {k: saved[k] for k in saved.files}
    stamps = out["stamps"]
    last = ask["peer_rounds"]
    result = {
        "rounds_per_s": rate(stamps, PEER_WARM_UP if side == "flower" else OUR_WARM_UP),
        "start_s": stamps[1] - done.started, "total_s": stamps[last] - done.started, "peak_mb": done.peak_mb, **out,
    }  # fmt: skip
    print(
        f"  {side:7s} {result['rounds_per_s']:8.2f} rounds/s, start {result['start_s']:5.1f} s, "
        f"{last} rounds in {result['total_s']:5.1f} s, peak {done.peak_mb:6.0f} MB",
        flush=True,
    )
    return result


def compare(steps: int, python: Path, repetitions: int, peer_rounds: int, peer_cpus: float) -> dict[str, Any]:
    """All repetitions of one case."""
    ask = values(steps, peer_rounds, peer_cpus)
    seen: dict[str, list[dict[str, Any]]] = {"ours": [], "flower": []}
    label = f"{WORKERS} clients, {steps} local step{'s' * (steps > 1)}"
    print(label, flush=True)
    for repetition in range(repetitions):
        for side in ("ours", "flower")[:: 1 if repetition % 2 == 0 else -1]:
            with tempfile.TemporaryDirectory() as name:
                write_problem(Path(name), ask)
                interpreter = python if side == "flower" else Path(sys.executable)
                seen[side].append(measure(side, Path(name), ask, interpreter))
    best = {side: max(each, key=lambda r: r["rounds_per_s"]) for side, each in seen.items()}
    theirs = accuracies(ask, best["flower"]["models"][1:])
    final = best["flower"]["models"][-1].astype(np.float64)
    row: dict[str, Any] = {
        "case": label, "ours": best["ours"]["rounds_per_s"], "peer": best["flower"]["rounds_per_s"], "unit": "rounds/s",
        "ratio": best["ours"]["rounds_per_s"] / best["flower"]["rounds_per_s"],
        "all_ours": [r["rounds_per_s"] for r in seen["ours"]], "all_peer": [r["rounds_per_s"] for r in seen["flower"]],
        "accuracy": float(theirs[-1]), "max_accuracy_diff": float(np.abs(best["ours"]["accuracy"] - theirs).max()),
        "rel_diff": float(np.linalg.norm(best["ours"]["final"] - final) / np.linalg.norm(final)),
        "compared_rounds": peer_rounds,
    }  # fmt: skip
    for key in ("start_s", "total_s", "peak_mb"):
        pick = max if key == "peak_mb" else min
        row[f"ours_{key}"], row[f"peer_{key}"] = (pick(float(r[key]) for r in seen[s]) for s in ("ours", "flower"))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--quick", action="store_true", help="one repetition of the case with one local step")
    parser.add_argument("--peer-cpus", type=float, default=1.0, help="CPUs that Flower reserves for a client's process")
    parser.add_argument("--ours", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if arguments.ours:
        ours(arguments.ours)
        return
    began = time.monotonic()
    python = flower_python()
    cases = [1] if arguments.quick else list(STEPS)
    repetitions, rounds = (1, 15) if arguments.quick else (2, PEER_ROUNDS)
    rows = [compare(steps, python, repetitions, rounds, arguments.peer_cpus) for steps in cases]
    differs = max(row["max_accuracy_diff"] for row in rows)
    result = results.result("flwr[simulation]", FLOWER, rows, began, max_accuracy_diff=differs)
    print(f"\n{'case':28s} {'ours':>8s} {'Flower':>8s}   ratio     memory MB     start s     accuracy  differs by")
    for row in rows:
        print(
            f"{row['case']:28s} {row['ours']:8.2f} {row['peer']:8.2f}  x{row['ratio']:6.1f}  {row['ours_peak_mb']:5.0f}"
            f" / {row['peer_peak_mb']:5.0f}  {row['ours_start_s']:4.1f} / {row['peer_start_s']:4.1f}     "
            f"{row['accuracy']:.4f}  {row['max_accuracy_diff']:.4f} (parameters {row['rel_diff']:.1e})"
        )
    print(f"geometric mean x{result['geomean_ratio']:.1f}, least x{result['min_ratio']:.1f}, {result['wall_s']:.0f} s")
    results.write(arguments.json, result)


if __name__ == "__main__":
    main()
