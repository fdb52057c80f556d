"""How a round over Ray actors scales with the number of virtual clients, beside one actor per client in plain Ray.

    python benchmarks/scale.py [--json PATH] [--quick]

10 to 10,000 clients on this machine, each with a momentum of its own, an MLP 64-32-10 on digits (30,000 noisy copies of
scikit-learn's, so that 10,000 clients have some), one local step on 16 examples, all clients in every round, rule `mean`.
Ours is jobs.byzantine.with_server itself with its barriers every 25 rounds; the only addition is a clock in the hosts.

What is measured, over a window of whole rounds after a warm-up that holds exactly as many barriers as it should:
- A round's wall time: from the first host's start of `train` to the same moment of the next round.
- Node time of a round: the largest, over the hosts, of the time spent inside train and receive in that round.
- Controller overhead: wall time less node time. It holds everything else: messages, scheduling, the server's aggregation,
  barriers, waiting. By the clock, so that what other programs take from a host counts as the host's time; and `strict`, by
  the hosts' CPU time, so that it counts as overhead, as does what our own processes take from each other.
- Start: from starting the process to the first round, all hosts ready.
- Memory: peak PSS of driver, hosts, server and Ray (see processes.py), from the start of the process to its end.
- `10 ms`: 100 clients with as many local steps as take 10 ms of CPU time per client, calibrated in the hosts' place first.
  The goal is judged by the larger share of two: of the wall time, and of the overhead beside exactly 10 ms per client.

The peer: one Ray actor per client, one call per client and round that brings the model and returns the update, and the same
aggregation in the driver. The same arithmetic, so the final models are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
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
from processes import run

SIZES = {10: 325, 25: 325, 100: 325, 1000: 125, 10_000: 30}
"""Clients -> rounds. All but the first few and the last are counted: a multiple of 25, the rounds between barriers."""
BARRIER = 25
LARGEST_BLOCK = 100
WORK_MS, WORK_CLIENTS, WORK_ROUNDS = 10.0, 100, 55
PEER_SIZES = {10: 200, 25: 60}
EXAMPLES = 30_000
OVERHEAD_GOAL, MEMORY_GOAL_GIB = 0.10, 16.0
COMPARED = 20
"""Rounds after which our model and the peer's are compared."""


# ---------------------------------------------------------------- the task


def write_digits(folder: Path) -> None:
    """EXAMPLES noisy copies of scikit-learn's digits as IDX files, the format of MNIST."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    rng = np.random.default_rng(0)
    rows = rng.integers(len(bunch.target), size=EXAMPLES)
    noisy = np.clip(bunch.images[rows] * (255 / 16) + rng.normal(0, 8, (EXAMPLES, 8, 8)), 0, 255).astype(np.uint8)
    labels = bunch.target[rows].astype(np.uint8)
    held_out = EXAMPLES // 10
    for part, keep in (("t10k", slice(0, held_out)), ("train", slice(held_out, None))):
        for kind, array in (("images-idx3", noisy[keep]), ("labels-idx1", labels[keep])):
            head = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
            (folder / f"{part}-{kind}-ubyte").write_bytes(head + array.tobytes())


def config(data: Path, clients: int, rounds: int, local_steps: int) -> Any:
    from jobs.byzantine import TrainConfig

    hosts = len(os.sched_getaffinity(0))
    return TrainConfig.of(
        {
            "out": str(data / "runs"), "wandb": False, "data": str(data), "problem": "mlp", "hidden": 32, "batch": 16,
            "partition": "iid", "workers": clients, "byzantine": 0, "attack": "none", "rule": "mean", "momentum": 0.9,
            "lr": 0.5, "lr_decay": 1.0, "rounds": rounds, "local_steps": local_steps, "local_lr": 0.01,
            "block": min(LARGEST_BLOCK, -(-clients // hosts)), "cluster": {"snapshot_every": BARRIER},
        }
    )  # fmt: skip


def steps_for(data: Path, clients: int, milliseconds: float) -> int:
    """Local steps that take one client this much CPU time when its block is stepped as a host steps it."""
    import torch

    from raysys.runtime.blocks import blocks
    from raysys.systems.byzantine.task import Task

    torch.set_num_threads(1)
    tried = 20
    setting = config(data, clients, 1, tried).arms()["robust"][1]
    task = Task(setting, 0)
    nodes = blocks(task.honest, setting.block)[0]
    block = task.workers(nodes)
    block.train(0)
    spent = []
    for t in range(1, 6):
        began = time.thread_time()
        block.train(t)
        spent.append(time.thread_time() - began)
    return max(1, round(tried * milliseconds / 1e3 * len(nodes) / float(np.median(spent))))


# ---------------------------------------------------------------- our side, a process of its own


def ours(ask: dict[str, Any], data: Path) -> dict[str, Any]:
    """Run the job's loop and read the hosts' clocks."""
    import jobs.byzantine as job
    from actors.client import Client
    from raysys.runtime.rounds import Rounds
    from raysys.runtime.run import Run
    from raysys.runtime.session import Session
    from raysys.systems.byzantine.task import Task

    class Clocked(Client):
        """A host of clients that notes when it works: (round, began, ended, CPU seconds)."""

        def __init__(self, *arguments: Any) -> None:
            self.worked: list[tuple[int, float, float, float]] = []
            super().__init__(*arguments)

        def _clock(self, round: int, work: Any, *arguments: Any) -> Any:
            began, cpu_began = time.monotonic(), time.thread_time()
            out = work(round, *arguments)
            self.worked.append((round, began, time.monotonic(), time.thread_time() - cpu_began))
            return out

        def train(self, round: int, cuts: Any) -> Any:
            return self._clock(round, super().train, cuts)

        def receive(self, round: int, *parts: Any) -> None:
            self._clock(round, super().receive, *parts)

        def clock(self) -> list[tuple[int, float, float, float]]:
            return self.worked

    class Loop(Rounds):
        """Keeps the model of one early round, and reads the clocks after the last."""

        def __iter__(self) -> Iterator[int]:
            clients, *_, server = self.participants
            for t in super().__iter__():
                if not seen:
                    seen["start"] = time.monotonic()
                if t == COMPARED and ask["compared"]:
                    seen["model"] = np.concatenate([state["model"] for _, state in server.snapshot()])
                yield t
            seen["worked"] = clients.each("clock")

    seen: dict[str, Any] = {}
    c = config(data, ask["clients"], ask["rounds"], ask["local_steps"])
    task = Task(c.arms()["robust"][1], 0)
    job.Client = Clocked
    with Session(c.cluster) as session, Run.open(c, system="byzantine", command="train") as folder:
        loop = partial(Loop, folder.stage("scale"), ask["rounds"], snapshot_every=BARRIER, log_every=10**9)
        job.with_server(task, loop, session, 1)
    np.save(data / "ours.npy", seen.get("model", np.empty(0)))
    return overhead(seen["worked"], ask["rounds"]) | {"start": seen["start"]}


def overhead(worked: list[list[tuple[int, float, float, float]]], rounds: int) -> dict[str, float]:
    """Wall, node and overhead time per round, from the hosts' clocks."""
    shape = (len(worked), rounds)
    node, strict, began = np.zeros(shape), np.zeros(shape), np.full(shape, np.inf)
    for host, notes in enumerate(worked):
        for t, start, end, spent in notes:
            node[host, t] += end - start
            strict[host, t] += spent
            began[host, t] = min(began[host, t], start)
    first = rounds - 1 - (rounds - 3) // BARRIER * BARRIER  # a window of whole barrier intervals, after a warm-up
    window = slice(first, rounds - 1)
    count = rounds - 1 - first
    wall = (began[:, -1].min() - began[:, first].min()) / count
    busy, cpu_busy = (float(x[:, window].max(0).sum()) / count for x in (node, strict))
    return {
        "rounds_per_s": 1 / wall, "round_ms": 1e3 * wall, "node_ms": 1e3 * busy, "overhead_ms": 1e3 * (wall - busy),
        "overhead": 1 - busy / wall, "strict_overhead": 1 - cpu_busy / wall,
        "cpu_ms_all_hosts": 1e3 * float(strict[:, window].sum()) / count, "window": count, "hosts": len(worked),
    }  # fmt: skip


# ---------------------------------------------------------------- the peer, a process of its own


def plain_ray(ask: dict[str, Any], data: Path) -> dict[str, Any]:
    """One actor per client."""
    import ray

    from raysys.systems.byzantine.task import Task

    class OneClient:
        def __init__(self, task: Task, node: int) -> None:
            import torch

            torch.set_num_threads(1)
            self.block = task.workers(np.array([node]))

        def step(self, t: int, model: Any) -> Any:
            self.block.receive(t, model)
            return self.block.train(t)[1]

    c = config(data, ask["clients"], ask["rounds"], 1)
    task = Task(c.arms()["robust"][1], 0)
    cores = len(os.sched_getaffinity(0))
    ray.init(address="local", num_cpus=cores, include_dashboard=False, log_to_driver=False, logging_level=40)
    actor = ray.remote(OneClient).options(num_cpus=0)
    clients = [actor.remote(task, node) for node in range(ask["clients"])]
    server, ids = task.server(), np.arange(ask["clients"])
    ray.get([client.__ray_ready__.remote() for client in clients])
    stamps, model = [time.monotonic()], server.model
    for t in range(ask["rounds"]):
        told = ray.put(model)
        rows = np.concatenate(ray.get([client.step.remote(t, told) for client in clients]))
        model = server.aggregate(t, ids, rows)
        stamps.append(time.monotonic())
        if t == COMPARED - 1:
            np.save(data / "plain.npy", model)
    ray.shutdown()
    first = ask["rounds"] // 5
    wall = (stamps[-1] - stamps[first]) / (ask["rounds"] - first)
    return {"rounds_per_s": 1 / wall, "round_ms": 1e3 * wall, "start": stamps[0]}


# ---------------------------------------------------------------- both


def measure(side: str, data: Path, **ask: Any) -> dict[str, Any]:
    """Run one side in a process of its own."""
    (data / "ask.json").write_text(json.dumps({"side": side, **ask}))
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, str(Path(__file__).resolve()), "--side", str(data)]
    done = run(command, {"PYTHONPATH": path})
    out: dict[str, Any] = json.loads((data / "answer.json").read_text())
    out |= {"start_s": out.pop("start") - done.started, "peak_mb": done.peak_mb, **ask}
    shown = f"overhead {out['overhead_ms']:6.1f} ms ({out['overhead']:.1%})" if "overhead" in out else ""
    print(
        f"{side:9s} {ask['clients']:6d} clients {ask.get('local_steps', 1):4d} steps {out['rounds_per_s']:8.2f} rounds/s "
        f"{out['peak_mb']:7.0f} MB, start {out['start_s']:5.1f} s  {shown}",
        flush=True,
    )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--quick", action="store_true", help="10 and 100 clients, few rounds")
    parser.add_argument("--side", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if arguments.side:
        data = arguments.side
        ask = json.loads((data / "ask.json").read_text())
        answer = (ours if ask.pop("side") == "ours" else plain_ray)(ask, data)
        (data / "answer.json").write_text(json.dumps(answer))
        return
    import ray

    began = time.monotonic()
    sizes = {10: 80, 100: 80} if arguments.quick else SIZES
    peers = {10: 40} if arguments.quick else PEER_SIZES
    rows, scale = [], []
    with tempfile.TemporaryDirectory() as name:
        data = Path(name)
        write_digits(data)
        steps = steps_for(data, WORK_CLIENTS, WORK_MS)
        for clients, rounds in sizes.items():
            one = measure("ours", data, clients=clients, rounds=rounds, local_steps=1, compared=clients in peers)
            scale.append(one)
            if clients not in peers:
                continue
            plain = measure("plain Ray", data, clients=clients, rounds=peers[clients])
            mine, theirs = (np.load(data / f"{side}.npy").astype(np.float64) for side in ("ours", "plain"))
            differs = float(np.linalg.norm(mine - theirs) / np.linalg.norm(theirs))
            rows.append(
                {
                    "case": f"{clients} clients", "ours": one["rounds_per_s"], "peer": plain["rounds_per_s"],
                    "unit": "rounds/s", "ratio": one["rounds_per_s"] / plain["rounds_per_s"],
                    "rel_diff": differs, "ours_peak_mb": one["peak_mb"], "peer_peak_mb": plain["peak_mb"],
                    "ours_start_s": one["start_s"], "peer_start_s": plain["start_s"],
                }
            )  # fmt: skip
        rounds = 30 if arguments.quick else WORK_ROUNDS
        work = measure("ours", data, clients=WORK_CLIENTS, rounds=rounds, local_steps=steps, compared=False)
        work["ms_per_client"] = work["cpu_ms_all_hosts"] / WORK_CLIENTS
        # The same overhead beside exactly 10 ms per client, whatever the calibration or a busy machine made of them.
        nominal = WORK_MS * -(-WORK_CLIENTS // work["hosts"])
        work["overhead_of_nominal"] = work["overhead_ms"] / (work["overhead_ms"] + nominal)
        scale.append(work)
    largest = max(scale, key=lambda one: one["clients"])
    worst = max(work["overhead"], work["overhead_of_nominal"])
    goals = [
        {
            "goal": f"overhead under {OVERHEAD_GOAL:.0%} at {WORK_CLIENTS} clients with {WORK_MS:g} ms of local work each",
            "measured": worst, "limit": OVERHEAD_GOAL, "met": worst < OVERHEAD_GOAL,
        },
        {
            "goal": f"{largest['clients']} clients fit in {MEMORY_GOAL_GIB:g} GiB", "limit": MEMORY_GOAL_GIB,
            "measured": largest["peak_mb"] * 1e6 / 2**30, "met": largest["peak_mb"] * 1e6 / 2**30 < MEMORY_GOAL_GIB,
        },
    ]  # fmt: skip
    result = results.result("one Ray actor per client", ray.__version__, rows, began, scale=scale, goals=goals)
    print(f"\n{'clients':>8s} {'steps':>6s} {'rounds/s':>9s} {'round ms':>9s} {'nodes ms':>9s} {'overhead':>17s} "
          f"{'strict':>7s} {'peak MB':>8s} {'start s':>8s}")  # fmt: skip
    for one in scale:
        print(
            f"{one['clients']:8d} {one['local_steps']:6d} {one['rounds_per_s']:9.2f} {one['round_ms']:9.1f} "
            f"{one['node_ms']:9.1f} {one['overhead_ms']:8.1f} ms {one['overhead']:5.1%} {one['strict_overhead']:7.1%} "
            f"{one['peak_mb']:8.0f} {one['start_s']:8.1f}"
        )
    for row in rows:
        print(f"{row['case']}: x{row['ratio']:.1f} the rounds of one actor per client ({row['peer']:.2f}/s, "
              f"{row['peer_peak_mb']:.0f} MB, start {row['peer_start_s']:.1f} s)")  # fmt: skip
    for goal in goals:
        print(f"{'met' if goal['met'] else 'MISSED'}: {goal['goal']}: {goal['measured']:.3g}")
    print(f"{result['wall_s']:.0f} s")
    results.write(arguments.json, result)


if __name__ == "__main__":
    main()
