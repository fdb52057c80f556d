"""Methods against graph processes: each method's step size is tuned by the same rule, then all run on common random numbers."""

from __future__ import annotations

import time
from typing import Any, Self

import numpy as np
import torch
from pydantic import Field, model_validator

from jobs.cli import ClusterJob
from raysys.runtime.pool import run_stages
from raysys.runtime.run import Run
from raysys.runtime.seeds import Seeds, Stream
from raysys.runtime.sentences import UserError
from raysys.runtime.session import Session
from raysys.runtime.statistics import mean_ci, paired_bootstrap
from raysys.systems.tad_lora import claims, figures
from raysys.systems.tad_lora.policies import METHODS
from raysys.systems.tad_lora.setting import Setting
from raysys.systems.tad_lora.simulate import Simulation
from raysys.systems.tad_lora.task import Task, check_task

TUNING_SEEDS = 1000
"""Seeds of the tuning runs start this much later: no run is tuned on the seeds it is judged by."""


class CompareConfig(ClusterJob, Setting):
    """Every method on every graph process, each with its own best step size; paired seeds, bootstrap over seeds and texts."""

    methods: list[str] = Field(["tad", "lora", "ffa", "rolora", "local"], min_length=2)
    """What is compared; tad must be among them."""
    topologies: list[str] = Field(["erdos_renyi(p=0.5)", "erdos_renyi(p=0.02)"], min_length=1)
    """Graph processes, from dense to sparse."""
    lrs: list[float] = Field([1e-3, 2e-3, 5e-3, 1e-2], min_length=1)
    """Step sizes tried for every method on every process."""
    tuning_seeds: int = Field(1, ge=1)
    """Seeds of each tuning run, other than those of the comparison; tuned on held-out training texts, not on the test set."""
    block: int = Field(10, ge=1)
    """Peers stepped together in one batch."""

    @model_validator(mode="after")
    def _cells_are_possible(self) -> Self:
        if self.problem != "text":
            raise ValueError(
                f"problem: got {self.problem}; compare is for text, the command theory for the regression problem"
            )
        if "tad" not in self.methods:
            raise ValueError(
                f"methods: got {', '.join(self.methods)}; tad, which the others are compared with, must be there"
            )
        for field in ("methods", "topologies", "lrs"):
            values = getattr(self, field)
            if len(set(values)) < len(values):
                raise ValueError(f"{field}: got {values}; each may be named once")
        for method in self.methods:
            if method not in METHODS:
                raise ValueError(f"methods: got {method!r}; allowed are {', '.join(METHODS)}")
            for topology in self.topologies:
                for lr in self.lrs:
                    self.cell(method, topology, lr)
        return self

    def check(self) -> None:
        if self.cluster.gpus_per_host:
            raise ValueError(
                f"cluster.gpus_per_host: got {self.cluster.gpus_per_host:g}; compare runs on CPUs, train takes GPUs"
            )
        check_task(Task(self.cell("tad", self.topologies[0], self.lrs[0]), self.seed))
        rates = {topology: rho_of(self, topology) for topology in self.topologies}
        if list(rates.values()) != sorted(rates.values()) or max(rates.values()) >= 1:
            told = ", ".join(f"{name}: rho {rate:.3f}" for name, rate in rates.items())
            raise ValueError(f"topologies: got {told}; expected them from dense to sparse, with rho below 1")

    @property
    def silent(self) -> set[str]:
        """Methods without exchange: the graphs do not matter to them, and one run serves all."""
        return {method for method in self.methods if METHODS[method](1).mixes(0) == ""}

    def cell(self, method: str, topology: str, lr: float, tuning: bool = False) -> Setting:
        """The setting of one run."""
        own = Setting.of({name: getattr(self, name) for name in Setting.model_fields} | {"topology": topology})
        return own.with_method(method, lr=lr, validate_on="validation" if tuning else "test")


def run_cell(setting: Setting, seed: int, block: int) -> dict[str, Any]:
    """One run in this process: its last measurements, what each test text and each peer came to, the cross term over time."""
    torch.set_num_threads(1)
    began = time.process_time()
    task = Task(setting, seed)
    simulated = Simulation(task, block)
    curve = []
    for t in range(task.rounds):
        simulated.step(t)
        if t >= task.delay:
            curve.append({"round": t - task.delay, **simulated.evaluate(t)})
    if "accuracy" not in curve[-1]:
        return {"diverged": True}
    right = simulated.right().astype(np.float64)
    return {k: v for k, v in curve[-1].items() if k != "round"} | {
        "items": right.mean(0),
        "peers": right.mean(1),
        "curve": curve,
        "bytes": simulated.bytes,
        "messages": simulated.messages,
        "interval": simulated.interval,
        "cpu_s": time.process_time() - began,
    }


def compare(config: CompareConfig, run: Run, session: Session) -> None:
    """Tune, run, compare."""
    cells = [(topology, method) for topology in config.topologies for method in config.methods]
    tuned = tune_steps(config, run, session, cells)
    seeds = range(config.seed, config.seed + config.seeds)
    where = {(t, m): config.topologies[0] if m in config.silent else t for t, m in cells}
    units = {
        f"{where[t, m]}/{m}/lr{tuned[t, m]:g}/seed{s}": (
            run_cell,
            (config.cell(m, where[t, m], tuned[t, m]), s, config.block),
        )
        for t, m in cells
        for s in seeds
    }
    results = run_stages(run, session, units, "compare")
    finals = {(t, m): [results[f"{where[t, m]}/{m}/lr{tuned[t, m]:g}/seed{s}"] for s in seeds] for t, m in cells}
    for (topology, method), each in finals.items():
        if any("diverged" in result for result in each):
            raise UserError(
                f"lrs: {method} on {topology} diverged at its best step size {tuned[topology, method]:g}; try smaller ones"
            )
        for result in each:
            run.count(messages=result["messages"], bytes=result["bytes"])
    for topology in config.topologies:
        lines = []
        ours = np.array([result["items"] for result in finals[topology, "tad"]])
        for method in config.methods:
            each = finals[topology, method]
            lr = tuned[topology, method]
            edge = "*" * (lr in (min(config.lrs), max(config.lrs)))
            line: dict[str, Any] = {"method": method, "lr": f"{lr:g}{edge}", "T": each[0]["interval"] or "-"}
            for metric, label, unit, digits in figures.reported("accuracy"):
                interval = mean_ci([result[metric] for result in each])
                run.row(metric, interval, method=method, topology=topology, lr=tuned[topology, method])
                line[label] = f"{unit * interval.mean:.{digits}f}"
            if method != "tad":
                theirs = np.array([result["items"] for result in each])
                gap = paired_bootstrap(ours, theirs, Seeds(config.seed).rng(Stream.SHUFFLE))
                run.row("tad's gain in accuracy, bootstrap over seeds and texts", gap, method=method, topology=topology)
                gain = mean_ci(ours.mean(1) - theirs.mean(1))
                run.row("tad's gain in accuracy", gain, method=method, topology=topology)
                line["tad's gain"] = f"{100 * gain.mean:+.1f}"
                for label, each_interval in (("t interval", gain), ("bootstrap", gap)):
                    if each_interval.low is not None and each_interval.high is not None:
                        line[label] = f"[{100 * each_interval.low:+.1f}, {100 * each_interval.high:+.1f}]"
            line["CPU s"] = f"{np.mean([result['cpu_s'] for result in each]):.0f}"
            lines.append(line)
        run.grid(
            f"{topology}: accuracy at each method's best step size (*: at the edge of those tried), {config.seeds} seeds",
            lines,
        )
        name = topology.replace("(", "-").rstrip(")").replace("=", "")
        curves = {method: [result["curve"] for result in finals[topology, method]] for method in config.methods}
        run.figure(f"curves-{name}", figures.score_curves(curves, "accuracy"))
        run.figure(f"cross-term-{name}", figures.cross_term_curves(curves))
        points = {
            method: (
                np.mean([r["bytes"] for r in finals[topology, method]]),
                [r["accuracy"] for r in finals[topology, method]],
            )
            for method in config.methods
        }
        run.figure(f"bytes-{name}", figures.accuracy_over_bytes(points))
    for metric, label in (
        ("accuracy", "mean accuracy of the peers' models"),
        ("worst_accuracy", "accuracy of the worst peer"),
    ):
        lines_of = {
            method: [
                (rho_of(config, topology), [r[metric] for r in finals[topology, method]])
                for topology in config.topologies
            ]
            for method in config.methods
        }
        run.figure(f"{metric.replace('_', '-')}-over-rho", figures.accuracy_over_rho(lines_of, label))
    if config.seeds > 1:
        for claim in claims.compare_claims(finals, config.topologies):
            run.claim(**claim)


def rho_of(config: CompareConfig, topology: str) -> float:
    """Contraction rate of a process."""
    return Task(config.cell("tad", topology, config.lrs[0]), config.seed).rho


def tune_steps(
    config: CompareConfig, run: Run, session: Session, cells: list[tuple[str, str]]
) -> dict[tuple[str, str], float]:
    """The step size of each (topology, method): the best mean accuracy of the peers on held-out training texts, ties to the
    smaller. The runs without exchange do not depend on the graphs and are tuned once."""
    seeds = range(config.seed + TUNING_SEEDS, config.seed + TUNING_SEEDS + config.tuning_seeds)
    first = config.topologies[0]

    def unit(topology: str, method: str, lr: float, seed: int) -> str:
        return f"tune/{first if method in config.silent else topology}/{method}/lr{lr:g}/seed{seed}"

    units = {
        unit(t, m, lr, s): (
            run_cell,
            (config.cell(m, first if m in config.silent else t, lr, tuning=True), s, config.block),
        )
        for t, m in cells
        for lr in config.lrs
        for s in seeds
    }
    results = run_stages(run, session, units, "tune")
    tuned, lines = {}, []
    for topology, method in cells:
        scores = {
            lr: float(np.mean([results[unit(topology, method, lr, s)].get("accuracy", -1.0) for s in seeds]))
            for lr in sorted(config.lrs)
        }
        tuned[topology, method] = max(scores, key=lambda lr: scores[lr])
        lines.append(
            {"graph": topology, "method": method} | {f"lr {lr:g}": f"{100 * v:.1f}" for lr, v in scores.items()}
        )
    run.grid(f"Accuracy (%) on held-out training texts by step size, {config.tuning_seeds} tuning seed(s): equal columns are"
             " equal step sizes", lines)  # fmt: skip
    return tuned
