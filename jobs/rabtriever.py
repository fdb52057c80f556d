"""Rationale-based retrieval: distil a generative reranker into a retriever that any inner-product index serves exactly.

python -m jobs.rabtriever                 a retriever over Ray Train and teacher actors, then all baselines on two tasks
python -m jobs.rabtriever train           teacher, then student; leaves an artifact for `index` and serve.retriever
python -m jobs.rabtriever compare         student, teacher, ablations and baselines on one data set, paired seeds
python -m jobs.rabtriever evaluate        a run's artifact on any data set; TREC run files
python -m jobs.rabtriever index           an index of a corpus for serve.retriever, with Ray Data
python -m jobs.rabtriever robot           success in SkillRetrieval-v0, where an instruction is met by retrieving skills
python -m jobs.rabtriever bench           online cost against document length and pool size, with the FLOPs of it
python -m jobs.rabtriever sweep           w, layers, step size, rollout (or any field) with Ray Tune
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import ray
import torch
from pydantic import Field

from actors.teacher import Teachers
from jobs.cli import ClusterJob, start
from jobs.rabtriever_compare import CompareConfig, compare, compare_all
from jobs.rabtriever_index import IndexConfig, build_index
from jobs.rabtriever_robot import RobotConfig, robot
from jobs.rabtriever_studies import STUDIES
from raysys.runtime.progress import Progress
from raysys.runtime.run import Run
from raysys.runtime.sentences import UserError
from raysys.runtime.session import Session
from raysys.runtime.statistics import mean_ci
from raysys.runtime.train import TrainConfig as Spread
from raysys.runtime.train import fit, fit_here
from raysys.systems.rabtriever.artifact import fingerprint, save_student, save_teacher
from raysys.systems.rabtriever.backbone import Backbone, joined
from raysys.systems.rabtriever.learners import Frozen, StudentLearner, TeacherLearner, start_predictor
from raysys.systems.rabtriever.metrics import measure
from raysys.systems.rabtriever.presets import PRESETS
from raysys.systems.rabtriever.reader import make_backbone, make_reader, merged, with_state
from raysys.systems.rabtriever.setting import Setting, StudentSetting, TeacherSetting
from raysys.systems.rabtriever.targets import LocalTargets, Targets
from raysys.systems.rabtriever.task import Problem, load_data, make_problem, source_of, student_scores
from raysys.systems.rabtriever.teacher import Reranker, digest

State = dict[str, torch.Tensor]


class TrainConfig(ClusterJob, Setting):
    """Train a reranker, distil it into a retriever, and keep both for serving."""

    presets: ClassVar = PRESETS

    seeds: int = Field(1, ge=1, le=10_000)
    """Repetitions; the first one's artifact is the run's."""
    train: Spread = Spread()
    """How training is spread over processes."""
    teachers: int = Field(1, ge=1, le=10_000)
    """Teacher actors that answer the student; documents are dealt to them. Their number changes no bit of the result."""
    cpus_per_teacher: float = Field(1.0, ge=0)
    """CPUs reserved for a teacher."""
    gpus_per_teacher: float = Field(0.0, ge=0)
    """GPUs reserved for a teacher; above 0 it computes on CUDA."""
    execution: Literal["actors", "inprocess"] = "actors"
    """actors: Ray Train workers and teacher actors; inprocess: the same numbers in this process."""

    @property
    def distributed(self) -> bool:
        return self.execution == "actors"

    shortlist: int = Field(0, ge=0)
    """When it is measured, the teacher reads only the student's best so many documents of each test query; 0 means all."""

    def check(self) -> None:
        for part, blocks in (("teacher", self.teacher.blocks), ("student", self.student.blocks)):
            if blocks % self.train.workers:
                raise ValueError(
                    f"train.workers: got {self.train.workers}; it must divide {part}.blocks, which is {blocks}"
                )
        if self.train.deepspeed == "zero3" and self.teacher.objective == "sft+dpo":
            raise ValueError(
                "train.deepspeed: got zero3 with teacher.objective sft+dpo; its reference needs whole weights, use zero2"
            )
        load_data(self, self.seed)
        make_reader(self.teacher)

    def check_room(self, session: Session) -> None:
        """Refuse workers and teachers that do not fit on this machine side by side, before anything is trained.

        Raises:
            UserError: they do not, and the cluster cannot grow.
        """
        have, t = ray.cluster_resources(), self.train
        for name, worker, teacher in (
            ("CPU", t.cpus_per_worker, self.cpus_per_teacher),
            ("GPU", t.gpus_per_worker, self.gpus_per_teacher),
        ):
            needed = t.workers * worker + self.teachers * teacher
            if session.embedded and needed > have.get(name, 0) + 1e-9:
                raise UserError(
                    f"teachers: {t.workers} workers and {self.teachers} teachers need {needed:g} {name}s; there are"
                    f" {have.get(name, 0):g}, so lower train.workers, teachers or {name.lower()}s_per_teacher"
                )


def train(config: TrainConfig, run: Run, session: Session) -> None:
    """Every seed, one after the other; then the table."""
    if config.execution == "actors":
        config.check_room(session)
    steps = (
        config.teacher.steps
        + config.student.steps
        + (config.teacher.dpo_steps if "dpo" in config.teacher.objective else 0)
    )
    results = []
    with Progress(steps * config.seeds, "train", unit="steps") as progress:
        for seed in range(config.seed, config.seed + config.seeds):
            stage = run.stage(f"seed{seed}/measured")
            if stage.result is None:
                stage.finish(train_once(config, seed, run, session, progress))
            results.append(stage.result or {})
    lines = []
    for method in ("student", "teacher"):
        line: dict[str, Any] = {"method": method}
        for metric in results[0][method]:
            found = mean_ci([result[method][metric] for result in results])
            run.row(metric, found, method=method, data=config.data)
            line[metric] = f"{100 * found.mean:.1f}"
        lines.append(line)
    first = results[0]
    run.grid(
        f"{first['data']}: {first['queries']} test queries over {first['documents']} documents (%), {config.seeds} seed(s)",
        lines,
    )
    if first["teachers"]:
        run.grid("Teachers of the first seed", first["teachers"])


def train_once(config: TrainConfig, seed: int, run: Run, session: Session, progress: Progress) -> dict[str, Any]:
    """One teacher and its student, from the last checkpoint to the artifact."""
    storage = run.storage if seed == config.seed else run.storage.join(f"seeds/{seed}")
    actors = config.execution == "actors"
    reader = make_reader(config.teacher)
    problem = make_problem(config, seed, reader)
    shared = ray.put(problem) if actors else problem

    def trained(name: str, make: Callable[[str], Any]) -> State:
        stage = run.stage(f"seed{seed}/{name}")
        if actors:
            return fit(stage, session, make, config.train, progress=progress)
        return fit_here(stage, make, config.train, progress=progress)

    backbone = train_teacher(config.teacher, seed, shared, trained)
    save_teacher(storage, config.teacher, backbone, reader)
    before = digest(backbone)

    n = len(problem.train.length)
    asked = joined(problem.train, problem.test)
    targets: Targets
    if actors:
        session.release()
        targets = teachers = Teachers.spawn(
            session, storage, problem.documents, asked, backbone.width,
            count=config.teachers, cpus=config.cpus_per_teacher, gpus=config.gpus_per_teacher,
        )  # fmt: skip
        queries, documents = teachers.query_states(), teachers.document_states()
    else:
        reranker = Reranker(backbone)
        targets = LocalTargets(reranker, problem.documents, asked)
        queries, documents = reranker.queries(asked), reranker.documents(problem.documents)
    frozen = Frozen(queries[:n], documents, backbone.head.weight.detach().float().cpu(), backbone.labels)
    given = ray.put(frozen) if actors else frozen
    state = trained("student", partial(make_student, config.student, given, shared, targets, seed))
    predictor = start_predictor(config.student, frozen, problem.examples, seed)
    state.pop("own", None)
    predictor.load_state_dict(state)
    if digest(backbone) != before:
        raise RuntimeError("the frozen teacher has changed")
    mark = fingerprint(config.teacher, backbone, reader)
    source = source_of(config.data, seed)
    save_student(storage, config.teacher, config.student, predictor, mark, source, problem.data.licence)

    student = student_scores(predictor, frozen, queries[n:])
    scores = {"student": student, "teacher": teacher_scores(targets, n, student, config.shortlist, frozen)}
    told = []
    if actors:
        for i, t in enumerate(teachers.telemetry()):
            rate = round(t["read"] / max(t["seconds"], 1e-9))
            told.append(
                {"teacher": i, "pairs answered": int(t["pairs"]), "pairs read": int(t["read"]), "read per second": rate}
            )
        teachers.stop()
    return {
        "data": source, "queries": len(problem.test.length), "documents": len(documents), "teachers": told,
        **{name: means(found, problem) for name, found in scores.items()},
    }  # fmt: skip


def train_teacher(
    setting: TeacherSetting,
    seed: int,
    shared: Any,
    trained: Callable[[str, Callable[[str], Any]], State],
) -> Backbone:
    """The reranker, fine-tuned on answers and, if asked for, on preferences."""
    state = trained("teacher", partial(make_teacher, setting, shared, seed, None))
    if setting.objective == "sft+dpo":
        state = trained("teacher/dpo", partial(make_teacher, setting, shared, seed, state))
    return with_weights(setting, seed, state)


def with_weights(setting: TeacherSetting, seed: int, state: State) -> Backbone:
    """A plain frozen backbone with trained weights, LoRA factors merged."""
    backbone = make_backbone(setting, make_reader(setting), seed)
    return merged(with_state(backbone, state)).eval().requires_grad_(False)


def make_teacher(setting: TeacherSetting, shared: Any, seed: int, first: State | None, device: str) -> TeacherLearner:
    """The learner of the reranker, in whatever process it is trained."""
    problem = fetched(shared)
    backbone = make_backbone(setting, make_reader(setting, device), seed, device)
    if first is not None:
        with_state(backbone, first)
    return TeacherLearner(
        setting, backbone, problem.examples, problem.documents, problem.train, seed, preferences=first is not None
    )


def make_student(
    setting: StudentSetting, frozen: Any, shared: Any, targets: Targets, seed: int, device: str
) -> StudentLearner:
    """The learner of the predictor."""
    return StudentLearner(setting, fetched(frozen), fetched(shared).examples, targets, seed, device)


def fetched(value: Any) -> Any:
    """What a reference refers to; anything else is itself."""
    return ray.get(value) if isinstance(value, ray.ObjectRef) else value


def teacher_scores(targets: Targets, first: int, student: np.ndarray, shortlist: int, frozen: Frozen) -> np.ndarray:
    """The teacher's log-odds (n, m) of test queries, rows `first` and on of what it got; -inf off the shortlist."""
    n, m = student.shape
    count = min(shortlist or m, m)
    chosen = np.sort(np.argpartition(-student, count - 1, 1)[:, :count], 1)
    out = np.full((n, m), -np.inf, dtype=np.float32)
    rows = max(1, 65_536 // count)
    for i in range(0, n, rows):
        part = np.arange(i, min(n, i + rows))
        pairs = np.stack([np.repeat(part, count), chosen[part].reshape(-1)], 1)
        states = targets.take(targets.ask(pairs + np.array([first, 0])))
        out[pairs[:, 0], pairs[:, 1]] = (states @ frozen.direction).numpy()
    return out


def means(scores: np.ndarray, problem: Problem) -> dict[str, float]:
    """Mean of each measure over the test queries that have a candidate."""
    return {name: float(np.nanmean(values)) for name, values in measure(scores, problem.data.test).items()}


SHOWN = (
    "student", "paper_student", "no_mul", "no_kl", "no_mse", "reverse_kl", "forward_kl", "listwise", "infonce", "teacher",
    "teacher_eq9", "hyper", "classifier", "bm25", "dense", "bi_encoder", "late_interaction", "cross_encoder",
)  # fmt: skip
"""Methods of the demo; `compare` has some ablations more."""


class DemoConfig(TrainConfig):
    """The tour: a retriever by Ray Train and teacher actors, then every method on a rationale and a fact task, three seeds."""

    seeds: int = Field(3, ge=1, le=10_000)
    """Paired repetitions of the comparison; the retriever itself is trained once."""
    seed: int = Field(10, ge=0, lt=2**63)
    """Every random number of the run derives from this one. Defaults were chosen while looking at seeds 0 to 2 of `rationale`."""
    baseline_steps: int = Field(20, ge=1)
    """Steps of the fine-tuned bi-encoder and late interaction, fewer than in `compare`, for time."""
    test: int = Field(200, ge=0)
    """Test queries used (a seeded choice); 0 means all."""
    teacher: TeacherSetting = TeacherSetting(steps=150)
    student: StudentSetting = StudentSetting(steps=200)


def demo(config: DemoConfig, run: Run, session: Session) -> None:
    """Both halves in one run folder and one report."""
    train(
        TrainConfig.of({name: getattr(config, name) for name in TrainConfig.model_fields} | {"seeds": 1}), run, session
    )
    session.release()
    tasks = ("rationale", "facts") if config.data == "rationale" else (config.data,)
    shared = {name: getattr(config, name) for name in Setting.model_fields} | {
        "seed": config.seed,
        "seeds": config.seeds,
    }
    shared |= {"cluster": config.cluster, "baseline_steps": config.baseline_steps, "methods": list(SHOWN)}
    compare_all([CompareConfig.of(shared | {"data": data}) for data in tasks], run, session)


def main() -> None:
    """Entry point of `python -m jobs.rabtriever`."""
    commands = {
        "demo": (DemoConfig, demo),
        "train": (TrainConfig, train),
        "compare": (CompareConfig, compare),
        "index": (IndexConfig, build_index),
        "robot": (RobotConfig, robot),
        **STUDIES,
    }
    start("rabtriever", commands, default="demo", description=__doc__ or "")


if __name__ == "__main__":
    main()
