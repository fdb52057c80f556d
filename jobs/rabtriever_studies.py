"""The studies of the Rabtriever system that train no artifact: evaluation of one, online cost, the sweep with Ray Tune."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from pydantic import Field

from jobs.cli import ClusterJob, Commands
from jobs.rabtriever_compare import teacher_state
from jobs.sweeps import SweepFlags, run_sweep
from raysys.data.retrieval import Retrieval, load_retrieval, write_run
from raysys.nn.pretrained import MINILM, load_base
from raysys.runtime.checkpoint import read_state, write_state
from raysys.runtime.config import Config
from raysys.runtime.pool import run_stages
from raysys.runtime.run import Run
from raysys.runtime.seeds import Seeds, Stream
from raysys.runtime.session import Session
from raysys.runtime.statistics import bootstrap
from raysys.runtime.train import TrainConfig as Spread
from raysys.runtime.train import fit_here
from raysys.systems.rabtriever import baselines, claims, figures
from raysys.systems.rabtriever.artifact import Retriever
from raysys.systems.rabtriever.contest import METRICS, contest, examine
from raysys.systems.rabtriever.cost import WAYS, Shape, measure
from raysys.systems.rabtriever.examples import Examples
from raysys.systems.rabtriever.metrics import measure as measure_ranking
from raysys.systems.rabtriever.reader import Reader, make_backbone, make_reader, merged, with_state
from raysys.systems.rabtriever.setting import Setting
from raysys.systems.rabtriever.task import Problem, load_data, make_problem, pick_queries, trained_on

# ---------------------------------------------------------------- evaluate


class EvaluateConfig(ClusterJob):
    """Measure a run's artifact on a data set, beside BM25 and the frozen encoder; write TREC run files."""

    run: str = ""
    """Run folder (path or URI) that `train` made."""
    data: str = ""
    """Data set, as for train, whose test queries are asked; by default the one that the run was trained on."""
    rerank: int = Field(10, ge=0)
    """The teacher reads the student's best so many documents again, as in serving; 0 leaves that out."""
    depth: int = Field(100, ge=1)
    """Documents per query in the run files."""

    @property
    def distributed(self) -> bool:
        return False

    def check(self) -> None:
        if not self.run:
            raise ValueError("run: is missing; expected the folder of a run that train made")
        load_retrieval(trained_on(Retriever.load(self.run).told.data, self.data))


def evaluate(config: EvaluateConfig, run: Run, session: Session) -> None:
    """Scores of each method, measured and written."""
    retriever = Retriever.load(config.run)
    source = trained_on(retriever.told.data, config.data)
    data = load_retrieval(source)
    u, c = retriever.queries(data.test.texts)
    student = u @ retriever.documents(data.documents).T + c[:, None]
    scores = {"student": student, "bm25": baselines.bm25(data), "dense": baselines.dense(data, load_base(MINILM))}
    if config.rerank:
        scores[f"student, teacher rereads {config.rerank}"] = reread(retriever, data, student, config.rerank)
    lines = []
    for method, found in scores.items():
        itself = np.flatnonzero(data.test.itself >= 0)
        found[itself, data.test.itself[itself]] = -np.inf  # a query's own text is no answer, in the run files either
        values = measure_ranking(found, data.test)
        line: dict[str, Any] = {"method": method}
        for metric in METRICS:
            each = values[metric][~np.isnan(values[metric])]
            interval = bootstrap(each, lambda sample: float(sample.mean()), Seeds(config.seed).rng(Stream.SHUFFLE))
            run.row(metric, interval, method=method, data=source)
            line[metric] = claims.percent(interval)
        lines.append(line)
        name = "".join(letter if letter.isalnum() else "-" for letter in method)
        told = write_run(data.test.ids, found, data.document_ids, name, config.depth)
        run.storage.write_bytes(f"trec/{name}.txt", told.encode())
    run.grid(
        f"{data.name}: {len(data.test)} queries, {len(data.documents)} documents (%, bootstrap over queries)", lines
    )


def reread(retriever: Retriever, data: Retrieval, student: np.ndarray, count: int) -> np.ndarray:
    """The student's scores with its first `count` documents put in the teacher's order, all of them above the rest."""
    out = student.copy()
    for row, query in enumerate(data.test.texts):
        first = student[row].argsort()[::-1][:count]
        teacher = retriever.rerank(query, [data.documents[i] for i in first])
        out[row, first] = student[row].max() + 1 + teacher - teacher.min()
    return out


# ---------------------------------------------------------------- bench


class BenchConfig(ClusterJob):
    """Online cost of a query: teacher, teacher with kept prefixes, and student, over document length."""

    seeds: int = Field(1, ge=1, le=10_000)
    """Not used: nothing here is random but the ids."""
    lengths: list[int] = Field([16, 32, 64, 128, 256, 512], min_length=2)
    """Document lengths in tokens."""
    pool: int = Field(1000, ge=1)
    """Documents that a query is scored against."""
    read: int = Field(16, ge=1)
    """Documents that the teacher really reads; it is charged pool / read times as much."""
    repeats: int = Field(9, ge=3)
    """Repetitions; the median counts."""
    width: int = Field(128, ge=16)
    """Hidden size of the model."""
    layers: int = Field(4, ge=1)
    """Layers of the model."""
    query: int = Field(32, ge=1)
    """Query length in tokens."""

    @property
    def distributed(self) -> bool:
        return False


def bench(config: BenchConfig, run: Run, session: Session) -> None:
    """Table, figure, and whether the student's cost is flat."""
    torch.set_num_threads(1)
    shape = Shape(config.width, config.layers, config.query)
    rows = list(measure(shape, sorted(config.lengths), config.pool, config.read, config.repeats))
    by = {(row["way"], row["document_length"]): row for row in rows}
    lines = []
    for length in sorted(config.lengths):
        line: dict[str, Any] = {"L_D": length}
        for way in WAYS:
            line[f"{way}, ms"] = f"{by[way, length]['ms']:.1f}"
        line["teacher / student"] = f"{by['teacher', length]['ms'] / by['student', length]['ms']:.0f}"
        line["kept / student"] = f"{by[WAYS[1], length]['ms'] / by['student', length]['ms']:.0f}"
        line["operations: teacher / student"] = f"{by['teacher', length]['flops'] / by['student', length]['flops']:.0f}"
        lines.append(line)
    run.grid(f"CPU time of a query over {config.pool} documents, one thread, median of {config.repeats}", lines)
    run.figure("cost", figures.cost_curves(rows, config.pool))
    short, long = min(config.lengths), max(config.lengths)
    growth = {way: by[way, long]["ms"] / by[way, short]["ms"] for way in WAYS}
    run.claim(
        f"the student's online cost does not grow with document length ({short} to {long} tokens: x {growth['student']:.2f};"
        f" the teacher's x {growth['teacher']:.1f})", "Figure 4", growth["student"] < 1.5, figure="figures/cost.png",
    )  # fmt: skip
    run.stage("bench").finish({"rows": rows})


# ---------------------------------------------------------------- sweep


class SweepConfig(SweepFlags, Setting):
    """Search fields of the student (or of the teacher) with Ray Tune; trials are measured on held-out training queries."""

    space: list[str] = Field(["student.kl_weight=0.25,1,4,16", "student.layers=1,2,3"], min_length=1)
    """What varies: student.field=a,b,c or teacher.field=low..high, with :log or :int for a logarithmic or whole range."""
    metric: str = "recall@1"
    """What decides: recall@1, recall@3, recall@5, recall@10, mrr@10 or ndcg@10 of the student."""
    seeds: int = Field(1, ge=1, le=10_000)
    """Seeds of each trial; their mean counts."""

    def check(self) -> None:
        load_data(self, self.seed)
        make_reader(self.teacher)
        fields = {
            f"{part}.{name}" for part in ("student", "teacher") for name in type(getattr(self, part)).model_fields
        }
        self.check_search(fields, set(METRICS), 1)


def sweep_command(config: SweepConfig, run: Run, session: Session) -> None:
    """One teacher per seed is trained first and shared by the trials that do not change it; then the trials."""
    setting = Setting.of({name: getattr(config, name) for name in Setting.model_fields})
    seeds = list(range(config.seed, config.seed + config.seeds))
    shared: dict[int, Any] = {}
    if not any(item.startswith("teacher.") for item in config.space):
        units = {f"teacher/seed{s}": (train_teacher, (setting, s, run.storage)) for s in seeds}
        run_stages(run, session, units, "teachers")
        shared = {s: saved(run, s) for s in seeds}
    run_sweep(config, run, session, partial(trial, setting, seeds, shared), 1)


def saved(run: Run, seed: int) -> dict[str, torch.Tensor]:
    """Weights of a teacher of the sweep."""
    state, _ = read_state(run.storage, f"teachers/{seed}.safetensors")
    return {name: torch.as_tensor(value) for name, value in state.items()}


def train_teacher(setting: Setting, seed: int, storage: Any) -> dict[str, Any]:
    """Train and save a teacher of the sweep."""
    torch.set_num_threads(1)
    reader, problem = validation(setting, seed)
    state = teacher_state(setting, seed, reader, problem)
    return {"digest": write_state(storage, f"teachers/{seed}.safetensors", state)}


def validation(setting: Setting, seed: int) -> tuple[Reader, Problem]:
    """Reader and problem in which a fifth of the training queries, a seeded choice, are in place of the test queries."""
    reader = make_reader(setting.teacher)
    whole = make_problem(setting, seed, reader)
    n = len(whole.data.train)
    held = np.zeros(n, bool)
    held[Seeds(seed).rng(Stream.SHUFFLE).permutation(n)[: max(1, n // 5)]] = True
    parts = [pick_queries(whole.data.train, np.flatnonzero(chosen)) for chosen in (~held, held)]
    data = replace(whole.data, train=parts[0], test=parts[1])
    train, test = (whole.train.pick(torch.from_numpy(np.flatnonzero(chosen))) for chosen in (~held, held))
    return reader, replace(whole, data=data, examples=Examples.of(data), train=train, test=test)


def trial(
    setting: Setting, seeds: list[int], shared: dict[int, Any], values: dict[str, Any], report: Callable[..., None]
) -> None:
    """Distil with these values on every seed; reports the means of what the student reaches on held-out queries."""
    changed: Config = setting.with_values(values)
    assert isinstance(changed, Setting)
    torch.set_num_threads(1)
    measured = []
    for seed in seeds:
        reader, problem = validation(changed, seed)
        state = shared.get(seed) or teacher_state(changed, seed, reader, problem)
        backbone = merged(with_state(make_backbone(changed.teacher, reader, seed), state))
        fit = partial(fit_here, None, config=Spread())
        found = contest(changed, seed, examine(backbone, problem, 0), ["student"], fit, 0)
        measured.append({m: float(np.nanmean(np.array(found["values"]["student"][m], float))) for m in METRICS})
    report(1, **{m: float(np.mean([one[m] for one in measured])) for m in METRICS})


STUDIES: Commands = {
    "evaluate": (EvaluateConfig, evaluate),
    "bench": (BenchConfig, bench),
    "sweep": (SweepConfig, sweep_command),
}
