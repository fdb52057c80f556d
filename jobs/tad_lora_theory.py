"""The studies of the TAD-LoRA system that are not training comparisons: the switching interval on the regression problem, and
the sweep over any field with Ray Tune."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator

from jobs.cli import ClusterJob, Commands
from jobs.sweeps import SweepFlags, run_sweep
from raysys.graph import make_process
from raysys.runtime.pool import run_stages
from raysys.runtime.run import Run
from raysys.runtime.seeds import Seeds, Stream
from raysys.runtime.session import Session
from raysys.runtime.statistics import mean_ci
from raysys.systems.tad_lora import claims, figures
from raysys.systems.tad_lora.interval import select_interval
from raysys.systems.tad_lora.setting import Setting
from raysys.systems.tad_lora.simulate import Simulation
from raysys.systems.tad_lora.study import COMMON_STEP, Arm, Study, run_arms
from raysys.systems.tad_lora.task import Task, check_task, contraction_of

METHOD_INTERVALS = [1, 2, 3, 5, 10, 15, 25]
TUNED_INTERVALS = [1, 5, 15, 25]
STEP_SIZES = [2.5e-4, 5e-4, 1e-3, 2e-3]
"""Tried for every method and graph; the common step size of the other tables, that of the specification, is larger."""
TUNING_SEEDS = 1000
"""Seeds that step sizes and T are tuned on start this much later than those that are reported."""


class TheoryConfig(ClusterJob):
    """Low-rank matrix regression over Erdos-Renyi graphs: every method, and the switching interval against connectivity."""

    seeds: int = Field(5, ge=1, le=1000)
    """Paired repetitions; intervals are over these."""
    p: list[float] = Field([0.5, 0.2, 0.1, 0.05, 0.02], min_length=2)
    """Probabilities of a link in a round, from dense to sparse."""
    intervals: list[int] = Field([1, 2, 3, 5, 10, 15, 25, 50], min_length=2)
    """Switching intervals T of the sweep."""
    rounds: int = Field(400, ge=20)
    """Rounds of the sweep over T: at least four times the largest T, so that whole cycles can be averaged."""
    peers: int = Field(10, ge=2, le=200)
    """Peers n."""
    kappa: float = Field(2.0, gt=0)
    """The law's T = kappa / sqrt(1 - rho), for the figure."""
    adam: bool = False
    """Adam, reset each round, instead of SGD."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if sorted(set(self.p), reverse=True) != self.p or not all(0 < p <= 1 for p in self.p):
            raise ValueError(f"p: got {self.p}; expected different probabilities from the largest to the smallest")
        if min(self.intervals) < 1 or 1 not in self.intervals or len(set(self.intervals)) < len(self.intervals):
            raise ValueError(f"intervals: got {self.intervals}; expected different whole numbers, 1 among them")
        if 4 * max(self.intervals) > self.rounds:
            raise ValueError(
                f"intervals: got {max(self.intervals)}; allowed is at most a quarter of the {self.rounds} rounds"
            )
        return self


def theory(config: TheoryConfig, run: Run, session: Session) -> None:
    """Two tables (all methods after 150 rounds; TAD over T after many) and whether the paper's claims show in them."""
    seeds = list(range(config.seed, config.seed + config.seeds))
    names = {p: f"erdos_renyi(p={p:g})" for p in config.p}
    short = Study(peers=config.peers, adam=config.adam)
    long = Study(peers=config.peers, adam=config.adam, rounds=config.rounds, window=2 * max(config.intervals))
    rng = Seeds(config.seed).rng(Stream.GRAPH, 1)
    rho = {n: contraction_of(make_process(n, config.peers, short.weights, rng), rng) for n in names.values()}
    law = {name: select_interval(rho[name], config.kappa, short.rounds) for name in rho}
    one_step = sorted({*METHOD_INTERVALS, *law.values()})
    plain = [("lora", 0), ("ffa", 0), ("rolora", 0)]
    arms = [(m, T, COMMON_STEP) for m, T in [*plain, *[("tad", T) for T in one_step]]]
    sweep = [(m, T, COMMON_STEP) for m, T in [plain[0], *[("tad", T) for T in sorted(config.intervals)]]]
    tries = [(m, T, lr) for lr in STEP_SIZES for m, T in [*plain, *[("tad", T) for T in TUNED_INTERVALS]]]
    units: dict[str, Any] = {f"sweep/{name}": (study_rows, (long, name, sweep, seeds)) for name in names.values()}
    units |= {f"methods/{name}": (study_rows, (short, name, arms, seeds)) for name in names.values()}
    every = seeds + [seed + TUNING_SEEDS for seed in seeds]
    units |= {f"tuned/{name}": (study_rows, (short, name, tries, every)) for name in names.values()}
    results = run_stages(run, session, units, "theory")
    tables: dict[str, dict[str, list[dict[str, Any]]]] = {
        study: {
            name: [r for r in results[f"{study}/{name}"]["rows"] if r["error"] is not None] for name in names.values()
        }
        for study in ("methods", "sweep")
    }
    methods, sweeps = tables["methods"], tables["sweep"]
    for unit, result in results.items():
        for row in result["rows"]:
            if row["error"] is None:
                run.event("diverged", study=unit, method=row["method"], T=row["interval"])
    tuned = {name: tune(config, run, name, results) for name in names.values()}
    best = {name: claims.best_interval(rows) for name, rows in sweeps.items()}
    for study, table in tables.items():
        lines = []
        for name, rows in table.items():
            line = {"graph": name, "rho": f"{rho[name]:.3f}"}
            for row in rows:
                label = f"T={row['interval']}" if row["method"] == "tad" else row["method"]
                interval = mean_ci(row["error"])
                run.row(
                    "relative error",
                    interval,
                    study=study,
                    topology=name,
                    method=row["method"],
                    T=row["interval"],
                )
                line[label] = f"{interval.mean:.4f}"
            lines.append(line | ({"best T": best[name], "T by the law": law[name]} if study == "sweep" else {}))
        rounds = (short if study == "methods" else long).rounds
        run.grid(f"Relative error of the peers' models after {rounds} rounds, mean of {config.seeds} seeds", lines)
    run.grid(
        f"Relative error, each method at its own best step size (and T), chosen on {config.seeds} other seeds",
        [{"graph": name} | {m: f"{np.mean(errors):.4f}" for m, errors in tuned[name].items()} for name in tuned],
    )
    over_rho = {m: [(rho[name], tuned[name][m]) for name in tuned] for m in ("lora", "rolora", "ffa", "tad")}
    run.figure("error-tuned", figures.accuracy_over_rho(over_rho, "relative error, each at its own step size"))
    run.figure("error-over-interval", figures.interval_sweep(sweeps, "error", "relative error of the peers' models"))
    run.figure("cross-term-over-interval", figures.interval_sweep(sweeps, "cross_term", "cross term $||C||_F$"))
    run.figure(
        "best-interval", figures.best_interval_figure(list(rho.values()), list(best.values()), list(law.values()))
    )
    cells = {
        method: [(rho[name], next(r["error"] for r in rows if r["method"] == method)) for name, rows in methods.items()]
        for method in ("lora", "rolora", "ffa")
    }
    cells["tad, best T"] = [(rho[name], claims.best_errors(rows)) for name, rows in methods.items()]
    run.figure("error-over-rho", figures.accuracy_over_rho(cells, "relative error of the peers' models"))
    if config.seeds > 1:
        for claim in claims.theory_claims(methods, tuned, sweeps, rho, law):
            run.claim(**claim)


def tune(config: TheoryConfig, run: Run, name: str, results: dict[str, dict[str, Any]]) -> dict[str, list[float]]:
    """Errors by reported seed of every method at the step size (and T) with the least mean error on the tuning seeds."""
    found = {}
    for method in ("lora", "rolora", "ffa", "tad"):
        tried = [
            (float(np.mean(row["error"][config.seeds :])), row)
            for row in results[f"tuned/{name}"]["rows"]
            if row["method"] == method and row["error"] is not None
        ]
        _, best = min(tried, key=lambda each: each[0])
        found[method] = best["error"][: config.seeds]
        run.row(
            "relative error",
            mean_ci(found[method]),
            study="tuned",
            topology=name,
            method=method,
            T=best["interval"],
            lr=best["lr"],
        )
    return found


def study_rows(study: Study, topology: str, arms: list[Arm], seeds: list[int]) -> dict[str, Any]:
    """A table of the study as a stage's result."""
    torch.set_num_threads(1)
    return {"rows": run_arms(study, topology, arms, seeds)}


class SweepConfig(SweepFlags, Setting):
    """Search the switching interval and the step size (or any field) with Ray Tune; each trial runs on all seeds."""

    space: list[str] = Field(["interval=1,2,3,5,10", "lr=1e-3,2e-3,5e-3"], min_length=1)
    """What varies: field=a,b,c or field=low..high, with :log or :int for a logarithmic or whole range."""
    validate_on: Literal["test", "validation"] = "validation"
    """What trials are measured on: held-out training texts, so that nothing is tuned on the test set."""
    block: int = Field(5, ge=1)
    """Peers stepped together in one batch."""

    def check(self) -> None:
        if self.cluster.gpus_per_host:
            raise ValueError(
                f"cluster.gpus_per_host: got {self.cluster.gpus_per_host:g}; a sweep runs on CPUs, train takes GPUs"
            )
        if self.mode == "max" and not self.metric.endswith("accuracy"):
            raise ValueError(f"mode: got max; less {self.metric} is better, so give --mode min")
        check_task(Task(self, self.seed))
        score = "error" if self.problem == "regression" else "accuracy"
        measured = {score, f"worst_{score}", f"consensus_{score}", "cross_term", "relative_cross_term"}
        self.check_search(set(Setting.model_fields), measured, self.rounds)


def sweep_command(config: SweepConfig, run: Run, session: Session) -> None:
    """The trials, their table and a figure."""
    base = {name: getattr(config, name) for name in Setting.model_fields}
    seeds = list(range(config.seed, config.seed + config.seeds))
    run_sweep(config, run, session, partial(trial, base, seeds, config.block), config.rounds)


def trial(
    base: dict[str, Any], seeds: list[int], block: int, values: dict[str, Any], report: Callable[..., None]
) -> None:
    """All seeds in step; reports the mean of what is measured whenever models are tested."""
    torch.set_num_threads(1)
    setting = Setting.of(base | values)
    simulations = [Simulation(Task(setting, seed), block) for seed in seeds]
    for t in range(simulations[0].task.rounds):
        for simulated in simulations:
            simulated.step(t)
        measured = [simulated.evaluate(t) for simulated in simulations] if simulations[0].tests(t) else []
        if measured:
            report(t + 1, **{k: float(np.mean([m[k] for m in measured])) for k in measured[0]})


STUDIES: Commands = {"theory": (TheoryConfig, theory), "sweep": (SweepConfig, sweep_command)}
