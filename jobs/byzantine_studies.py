"""The studies of the Byzantine system that are not training comparisons: the theory, the audit, the sweep.

Their units are independent, so they run as Ray tasks or Tune trials.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator

from jobs.byzantine_matrix import ROBUST, check_data
from jobs.cli import ClusterJob, Commands
from jobs.sweeps import SweepFlags, exactly, run_sweep
from raysys.aggregation import make_rule
from raysys.aggregation.audit import kappa_search
from raysys.runtime.pool import run_stages
from raysys.runtime.run import Run
from raysys.runtime.session import Session
from raysys.systems.byzantine import figures, floors, gossip
from raysys.systems.byzantine.setting import Setting, named
from raysys.systems.byzantine.simulate import simulation
from raysys.systems.byzantine.task import Task
from raysys.systems.byzantine.theory_claims import theory_claims


class TheoryConfig(ClusterJob):
    """Measure error floors on the exact worst-case instances and hold them against the bounds."""

    workers: int = Field(20, ge=5, le=1000)
    """Workers n of the instances."""
    dissimilarity_b: list[float] = Field([0.0, 0.5, 1.0, 1.5], min_length=1)
    """Values of B."""
    rules: list[str] = Field(list(floors.RULES), min_length=1)
    """Rules to put on the instances; trimmed_mean, the optimal one, must be among them."""

    @model_validator(mode="after")
    def _rules_exist(self) -> Self:
        for rule in self.rules:
            named("rules", rule, make_rule, rule, self.workers, 1)
        if "trimmed_mean" not in self.rules:
            raise ValueError(f"rules: got {self.rules}; trimmed_mean must be among them, the bounds are its own")
        return self


def theory(config: TheoryConfig, run: Run, session: Session) -> None:
    """Floors over f/n and B, noise, momentum, a wrong f, and the phase transition of gossip."""
    n, rules = config.workers, tuple(config.rules)
    fs = sorted({max(1, n * k // 10) for k in (1, 2, 3, 4)})
    units: dict[str, Any] = {
        f"floors/B={b:g}": (
            rows_of,
            (floors.floors_table, {"ns": (n,), "Bs": (b,), "rules": rules, "seed": config.seed}),
        )
        for b in config.dissimilarity_b
    }
    units["noise"] = (rows_of, (floors.noise_table, {"n": n, "fs": fs, "seed": config.seed}))
    units["momentum"] = (rows_of, (floors.momentum_table, {"n": n, "f": 3 * n // 10, "seed": config.seed}))
    units["misspecified"] = (rows_of, (floors.misspecified_table, {"n": n, "f": n // 10, "seed": config.seed}))
    units["gossip"] = (rows_of, (gossip.gossip_table, {"seed": config.seed}))
    tables: dict[str, list[dict[str, Any]]] = {}
    for name, result in run_stages(run, session, units, "theory").items():
        tables.setdefault(name.partition("/")[0], []).extend(result["rows"])
    lines: dict[int, dict[str, Any]] = {}
    for row in tables["floors"]:
        if row["rule"] == "trimmed_mean":
            cell = (
                f"{row['measured']:.4f} / {row['lower_bound']:.4f}" if np.isfinite(row["lower_bound"]) else "unbounded"
            )
            lines.setdefault(row["f"], {"f": row["f"]})[f"B={row['B']:g}"] = cell
    run.grid(f"Floor of |grad L_H|^2, measured / exact, trimmed mean, n = {n}, G = 1", list(lines.values()))
    shown = [
        {k: v if isinstance(v, str) else round(v, 4) for k, v in r.items() if v is not None} for r in tables["momentum"]
    ]
    run.grid("Local momentum: measured floor and its bound", shown)
    run.grid(
        "Gossip on two cliques",
        [{k: v if isinstance(v, str) else f"{v:.3g}" for k, v in r.items()} for r in tables["gossip"]],
    )
    for name, rows in tables.items():
        for row in rows:
            compared = {
                k: v
                for k, v in row.items()
                if isinstance(v, str) or k in ("n", "f", "B", "alpha", "f_hat", "b", "limit", "z")
            }
            value = row["ratio" if name == "gossip" else "measured"]
            run.row("variance ratio" if name == "gossip" else "floor", exactly(value), study=name, **compared)
    draw = {
        "floors": figures.floors_figure,
        "momentum": figures.momentum_figure,
        "gossip": figures.gossip_figure,
        "misspecified": figures.misspecified_figure,
    }
    for name, figure in draw.items():
        run.figure(name, figure(tables[name]))
    for claim in theory_claims(tables):
        run.claim(**claim)


def rows_of(table: Callable[..., list[dict[str, Any]]], options: dict[str, Any]) -> dict[str, Any]:
    """A table of the theory as a stage's result."""
    torch.set_num_threads(1)
    return {"rows": table(**options)}


class AuditConfig(ClusterJob):
    """Search for the worst inputs of a rule, your own (module:function) included: how robust is it really?"""

    rules: list[str] = Field(["mean", *ROBUST], min_length=1)
    """Rules to audit (see train --rule)."""
    workers: int = Field(10, ge=3, le=100)
    """Rows n; up to 12 every choice of honest rows is tried."""
    byzantine: list[int] = Field([1, 2, 3, 4], min_length=1)
    """Values of f, each less than half of n."""
    dimension: int = Field(1, ge=1, le=1000)
    """Coordinates of the inputs; coordinate-wise rules are worst in 1."""
    steps: int = Field(2000, ge=1)
    """Moves of the hill-climb; more find worse inputs."""
    measure: Literal["trace", "lambda"] = "trace"
    """Spread of the honest rows: their average squared distance to the mean, or its largest eigenvalue."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        for f in self.byzantine:
            if not 0 < 2 * f < self.workers:
                raise ValueError(
                    f"byzantine: got {f}; allowed is more than 0 and less than half of the {self.workers} workers"
                )
        for rule in self.rules:
            named("rules", rule, make_rule, rule, self.workers, min(self.byzantine))
        return self


def audit(config: AuditConfig, run: Run, session: Session) -> None:
    """kappa found, beside the formula of the rule and the bound that no rule is below."""
    units = {f"{r}/f={f}": (audit_one, (r, f, config)) for r in config.rules for f in config.byzantine}
    results = run_stages(run, session, units, "audit")
    table = []
    for rule in config.rules:
        line: dict[str, Any] = {"rule": rule}
        for f in config.byzantine:
            found = results[f"{rule}/f={f}"]
            if found["refused"]:
                line[f"f={f}"] = "n/a"
                continue
            run.row(
                "kappa found",
                exactly(found["kappa"]),
                rule=rule,
                f=f,
                lower_bound=found["lower_bound"],
                formula=found["formula"],
            )
            line[f"f={f}"] = f"{found['kappa']:.3g}" + (
                f" ({found['formula']:.3g})" if found["formula"] is not None else ""
            )
        table.append(line)
    price = {"rule": "no rule is below"} | {f"f={f}": f"{f / (config.workers - 2 * f):.3g}" for f in config.byzantine}
    run.grid(f"kappa found (formula of the rule), n = {config.workers}, d = {config.dimension}", [*table, price])
    for name, found in results.items():
        if found["formula"] is not None and config.measure == "trace":
            holds = found["kappa"] <= found["formula"] * (1 + 1e-9)
            run.claim(
                f"{name}: nothing worse than the formula is found",
                found["source"],
                holds,
                [found["kappa"], found["formula"]],
            )


def audit_one(rule: str, f: int, config: AuditConfig) -> dict[str, Any]:
    """One search; `refused` where the rule is not defined for (n, f)."""
    torch.set_num_threads(1)
    try:
        made = make_rule(rule, config.workers, f)
    except ValueError as error:
        return {"refused": str(error)}
    rng = np.random.default_rng(config.seed)

    def apply(x: torch.Tensor) -> torch.Tensor:
        return made(x, rng=rng)

    found = kappa_search(
        apply,
        config.workers,
        f,
        dimension=config.dimension,
        steps=config.steps,
        seed=config.seed,
        measure=config.measure,
    )
    known = made.kappa(config.workers, f)
    formula = known.value if known is not None and np.isfinite(known.value) else None
    return {
        "refused": None,
        "kappa": min(found.kappa, 1e300),
        "lower_bound": found.lower_bound,
        "witness": found.witness,
        "honest": found.honest,
        "formula": formula,
        "source": known.source if known is not None else None,
    }


class SweepConfig(SweepFlags, Setting):
    """Search hyperparameters with Ray Tune; each trial is the simulation of this setting on all seeds."""

    report_every: int = Field(20, ge=1)
    """Rounds between reports of a trial."""

    def check(self) -> None:
        check_data(self)
        measured = set(simulation(Task(self, self.seed)).evaluate(0))
        self.check_search(set(Setting.model_fields), measured, self.rounds)


def sweep_command(config: SweepConfig, run: Run, session: Session) -> None:
    """The trials, their table and a figure."""
    base = {name: getattr(config, name) for name in Setting.model_fields}
    seeds = list(range(config.seed, config.seed + config.seeds))
    run_sweep(config, run, session, partial(trial, base, seeds, config.report_every), config.rounds)


def trial(
    base: dict[str, Any], seeds: list[int], every: int, values: dict[str, Any], report: Callable[..., None]
) -> None:
    """All seeds in step; reports the mean of every measurement."""
    torch.set_num_threads(1)
    setting = Setting.of(base | values)
    simulations = [simulation(Task(setting, seed)) for seed in seeds]
    for t in range(setting.rounds):
        for simulated in simulations:
            simulated.step(t)
        if (t + 1) % every == 0 or t == setting.rounds - 1:
            measured = [simulated.evaluate(t) for simulated in simulations]
            report(t + 1, **{k: float(np.mean([m[k] for m in measured])) for k in measured[0]})


STUDIES: Commands = {
    "theory": (TheoryConfig, theory),
    "audit": (AuditConfig, audit),
    "sweep": (SweepConfig, sweep_command),
}
