"""Student, teacher, ablations, controls and baselines on one data set: paired seeds, each unit a Ray task."""

from __future__ import annotations

import time
from functools import partial
from typing import Any, Self

import torch
from pydantic import Field, model_validator

from jobs.cli import ClusterJob
from raysys.runtime.pool import run_stages
from raysys.runtime.run import Run
from raysys.runtime.session import Session
from raysys.runtime.train import TrainConfig as Spread
from raysys.runtime.train import fit_here
from raysys.systems.rabtriever import claims, figures
from raysys.systems.rabtriever.contest import ASKED, METHODS, STUDENTS, TAUGHT, TOP, contest, examine
from raysys.systems.rabtriever.learners import TeacherLearner
from raysys.systems.rabtriever.reader import Reader, make_backbone, make_reader, merged, with_state
from raysys.systems.rabtriever.setting import Setting
from raysys.systems.rabtriever.task import Problem, load_data, make_problem


class CompareConfig(ClusterJob, Setting):
    """All methods on one data set; each seed draws its own weights and batches and, of a generated task, its own data."""

    methods: list[str] = Field(list(METHODS), min_length=1)
    """What is compared; student and teacher must be among them."""
    shortlist: int = Field(0, ge=0)
    """The teacher scores only so many of each test query's best documents by the frozen encoder; 0 means all documents."""

    @model_validator(mode="after")
    def _known_methods(self) -> Self:
        for method in self.methods:
            if method not in METHODS:
                raise ValueError(f"methods: got {method!r}; allowed are {', '.join(METHODS)}")
        if not {"student", "teacher"} <= set(self.methods) or len(set(self.methods)) < len(self.methods):
            raise ValueError(
                f"methods: got {', '.join(self.methods)}; student and teacher must be there, each method once"
            )
        return self

    baseline_steps: int = Field(100, ge=1)
    """Steps of the fine-tuned bi-encoder and late interaction: by default about the CPU time of a teacher. The cross-encoder, far
    dearer per step, gets a fifth."""
    seed: int = Field(10, ge=0, lt=2**63)
    """Every random number of the run derives from this one. Defaults were chosen while looking at seeds 0 to 2 of `rationale`."""

    def check(self) -> None:
        load_data(self, self.seed)
        make_reader(self.teacher)


def compare(config: CompareConfig, run: Run, session: Session) -> None:
    """Run every seed, then tables, figures and claims."""
    compare_all([config], run, session)


def compare_all(configs: list[CompareConfig], run: Run, session: Session) -> None:
    """Several comparisons whose seeds share the machine's CPUs; then each one's report."""
    units: dict[str, Any] = {}
    named: list[list[str]] = []
    for config in configs:
        setting = Setting.of({name: getattr(config, name) for name in Setting.model_fields})
        more = list(config.methods), config.shortlist, config.baseline_steps
        own = {
            f"compare/{config.data}/seed{s}": (run_seed, (setting, s, *more))
            for s in range(config.seed, config.seed + config.seeds)
        }
        named.append(list(own))
        units |= own
    results = run_stages(run, session, units, f"compare on {', '.join(config.data for config in configs)}")
    for config, names in zip(configs, named, strict=True):
        report(config, run, [results[name] for name in names])


def run_seed(setting: Setting, seed: int, methods: list[str], shortlist: int, steps: int) -> dict[str, Any]:
    """One seed in this process: teacher, then every method."""
    torch.set_num_threads(1)
    reader = make_reader(setting.teacher)
    problem = make_problem(setting, seed, reader)
    began = time.process_time()
    backbone = with_state(make_backbone(setting.teacher, reader, seed), teacher_state(setting, seed, reader, problem))
    trained = examine(merged(backbone), problem, shortlist)
    spent = time.process_time() - began
    found = contest(setting, seed, trained, methods, partial(fit_here, None, config=Spread()), steps)
    return found | {"teacher_cpu_s": spent}


def teacher_state(setting: Setting, seed: int, reader: Reader, problem: Problem) -> dict[str, torch.Tensor]:
    """Trained weights of a teacher, all stages of its objective, in this process."""
    state: dict[str, torch.Tensor] | None = None
    for preferences in (False, True) if setting.teacher.objective == "sft+dpo" else (False,):

        def make(device: str, start: Any = state, second: bool = preferences) -> TeacherLearner:
            backbone = make_backbone(setting.teacher, reader, seed)
            if start is not None:
                with_state(backbone, start)
            return TeacherLearner(
                setting.teacher, backbone, problem.examples, problem.documents, problem.train, seed, preferences=second
            )

        state = fit_here(None, make, Spread())
    assert state is not None
    return state


def report(config: CompareConfig, run: Run, results: list[dict[str, Any]]) -> None:
    """Tables with intervals over seeds, the student's paired gains, figures, claims."""
    first = results[0]
    how = f"{len(results)} seeds and queries" if first["fixed"] else f"{len(results)} seeds"
    lines = []
    for method in config.methods:
        line: dict[str, Any] = {"method": method}
        for label, metric, part in claims.COLUMNS:
            found = claims.interval(results, method, metric, part)
            if found is not None:
                run.row(metric, found, method=method, data=config.data, queries=part)
                line[label] = claims.percent(found)
        if method != "student":
            gain = claims.gain(results, method, "recall@1")
            if gain is not None:
                run.row("student's gain in recall@1", gain, method=method, data=config.data, queries="all")
                line["student's gain in R@1"] = claims.percent(gain, signed=True)
        line["CPU s"] = f"{sum(r['cpu_s'][method] for r in results) / len(results):.1f}"
        line["+ teacher"] = "yes" if method in (*STUDENTS, *TAUGHT) else ""
        lines.append(line)
    pool = f"{first['documents']} documents, {first['withheld']} of them withheld from training, hidden size {first['width']}"
    run.grid(
        f"{config.data}: {first['queries']} test queries over {pool}; %, [95 % interval over {how}]"
        f"; a teacher took {sum(r['teacher_cpu_s'] for r in results) / len(results):.0f} CPU s;"
        f" the cross-encoder reads the bi-encoder's best {TOP} for {ASKED} queries"
        + (f"; teacher reads the encoder's best {config.shortlist}" if config.shortlist else ""),
        lines,
    )
    shown = [
        {"method": method} | {label: f"{claims.mean_of(results, method, key):.3f}" for label, key in claims.FIDELITY}
        for method in config.methods if method in first["fidelity"]
    ]  # fmt: skip
    run.grid(
        f"{config.data}: how well students meet their teacher (energy: MSE of states over their variance, known pairs)",
        shown,
    )
    if first["note"]:
        run.event("data", source=config.data, reason=first["note"])
    plain = "".join(c if c.isalnum() else "-" for c in config.data.rstrip("/").rpartition("/")[2]).strip("-")
    run.figure(
        f"recall-{plain}",
        figures.recall_bars(results, config.methods, f"{config.data}, {first['documents']} documents"),
    )
    if len(results) > 1:
        for claim in claims.compare_claims(results, config.data):
            run.claim(**claim, figure=f"figures/recall-{plain}.png")
