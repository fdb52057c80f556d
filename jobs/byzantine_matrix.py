"""The matrix: every rule against every attack on every division of the data, on paired seeds.

Cells are independent, so they run as Ray tasks on the in-process simulation, whose numbers are those of the actors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import numpy as np
import torch
from pydantic import Field, model_validator

from jobs.cli import ClusterJob
from raysys.attacks import Threat
from raysys.runtime.pool import run_stages
from raysys.runtime.run import Run
from raysys.runtime.session import Session
from raysys.systems.byzantine import claims, figures
from raysys.systems.byzantine.setting import Setting, Training, named
from raysys.systems.byzantine.simulate import simulation
from raysys.systems.byzantine.task import Task

ROBUST = ["trimmed_mean", "median", "geometric_median", "krum", "nnm+trimmed_mean", "arc+nnm+geometric_median", "caf"]
ATTACKS = ["none", "sign_flip", "ipm", "foe", "alie", "min_max", "mimic", "label_flip", "best_response"]


def check_data(setting: Setting) -> None:
    """Read the data, divide it, build the model, and let rule and attack meet once on a few random numbers: whatever is
    wrong with any of them, the user's own code included, is found here.

    Raises:
        ValueError: one sentence that names the field.
    """
    task = Task(setting, 0)
    if setting.problem != "quadratic":
        _ = task.partition
    _ = task.problem
    if setting.topology != "server":
        return
    named("sample" if setting.sample else "rule", str(setting.sample or setting.rule), lambda: task.rule)
    n, f = task.rule.n, min(setting.byzantine, (task.rule.n - 1) // 2)
    rng = np.random.default_rng(0)
    honest = torch.from_numpy(rng.normal(size=(n - f, 7)).astype(np.float32))
    threat = Threat(n=n, f=f, round=0, rng=rng, rule=task.rule, reference=honest[0], own=honest[:f])
    named("attack", setting.attack, tried, lambda: task.attack.craft(honest, threat))
    named("rule", setting.rule, tried, lambda: task.rule.aggregate(honest, reference=honest[0], rng=rng))


def tried(work: Callable[[], object]) -> None:
    """Run what may be the user's code; any failure becomes a ValueError that says what happened."""
    try:
        work()
    except Exception as error:
        raise ValueError(f"it failed on random numbers ({type(error).__name__}: {error})") from error


class MatrixConfig(ClusterJob, Training):
    """Run every rule against every attack; each cell is one training run in a Ray task."""

    rules: list[str] = Field(["mean", *ROBUST], min_length=1)
    """Aggregation rules (see train --rule)."""
    attacks: list[str] = Field(ATTACKS, min_length=1)
    """Attacks (see train --attack); best_response is the worst of a family, chosen anew every round."""
    partitions: list[str] = Field(["dirichlet(10)", "dirichlet(0.3)"], min_length=1)
    """Divisions of the data (see train --partition)."""
    rounds: int = Field(150, ge=1)
    """Training rounds T of a cell."""

    @model_validator(mode="after")
    def _cells_are_possible(self) -> Self:
        if self.problem == "quadratic" or self.topology != "server":
            raise ValueError(
                "problem: a matrix compares accuracies of server rules; it needs real data and topology server"
            )
        for field in ("rules", "attacks", "partitions"):
            values = getattr(self, field)
            if len(set(values)) < len(values):
                raise ValueError(f"{field}: got {values}; each may be named once")
        for rule in self.rules:
            named("rules", rule, self.cell, self.partitions[0], rule, self.attacks[0])
        for attack in self.attacks:
            named("attacks", attack, self.cell, self.partitions[0], self.rules[0], attack)
        for partition in self.partitions:
            named("partitions", partition, self.cell, partition, self.rules[0], self.attacks[0])
        return self

    def check(self) -> None:
        for partition in self.partitions:
            check_data(self.cell(partition, self.rules[0], self.attacks[0]))
        for rule in self.rules:
            for attack in self.attacks:
                check_data(self.cell(self.partitions[0], rule, attack))

    def cell(self, partition: str, rule: str, attack: str) -> Setting:
        """The setting of one cell."""
        values = {name: getattr(self, name) for name in Training.model_fields}
        return Setting(**values, partition=partition, rule=rule, attack=attack)


def train_cell(setting: Setting, seed: int) -> dict[str, Any]:
    """One training run in this process; its last measurements."""
    torch.set_num_threads(1)
    simulated = simulation(Task(setting, seed))
    for t in range(setting.rounds):
        simulated.step(t)
    return simulated.evaluate(setting.rounds - 1)


def matrix(config: MatrixConfig, run: Run, session: Session) -> None:
    """Every rule against every attack on every division of the data, on paired seeds."""
    keys = [(p, r, a) for p in config.partitions for r in config.rules for a in config.attacks]
    seeds = range(config.seed, config.seed + config.seeds)
    units = {f"{p}/{r}/{a}/seed{s}": (train_cell, (config.cell(p, r, a), s)) for p, r, a in keys for s in seeds}
    results = run_stages(run, session, units, "matrix")
    cells = {(p, r, a): [results[f"{p}/{r}/{a}/seed{s}"] for s in seeds] for p, r, a in keys}
    rows = claims.matrix_rows(cells)
    for row in rows:
        run.row("accuracy", row["interval"], partition=row["partition"], rule=row["rule"], attack=row["attack"])
    for partition in config.partitions:
        table = []
        for rule in config.rules:
            mine = {r["attack"]: r["interval"] for r in rows if (r["partition"], r["rule"]) == (partition, rule)}
            line: dict[str, Any] = {"rule": rule}
            line |= {attack: f"{100 * i.mean:.1f}" for attack, i in mine.items()}
            table.append(
                line | {"worst attack": claims.worst_attack(cells, partition, rule)} if "worst" in mine else line
            )
        run.grid(f"Test accuracy (%) after {config.rounds} rounds, {partition}, mean of {config.seeds} seeds", table)
        heat = [r for r in rows if r["partition"] == partition]
        run.figure(
            "matrix-" + partition.replace("(", "-").rstrip(")"),
            figures.matrix_heat_map(heat, title=f"{config.data}, {partition}"),
        )
    if config.seeds > 1:
        for claim in claims.matrix_claims(cells):
            run.claim(**claim)
