"""Every method on one data set and one seed: the student, its teacher, the paper's ablations, the controls, the baselines.

Shapes: n test queries, m documents.

All students share the teacher, its cached answers, the queries and the batches of a seed; every method sees known documents only.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from raysys.nn.pretrained import MINILM, load_base
from raysys.systems.rabtriever import baselines, controls
from raysys.systems.rabtriever.backbone import Backbone, joined
from raysys.systems.rabtriever.cross_encoder import cross_encoder
from raysys.systems.rabtriever.examples import spread
from raysys.systems.rabtriever.learners import Frozen, StudentLearner
from raysys.systems.rabtriever.metrics import measure
from raysys.systems.rabtriever.setting import Setting, StudentSetting
from raysys.systems.rabtriever.targets import LocalTargets
from raysys.systems.rabtriever.task import Problem, energies, pick_queries, source_of, student_scores
from raysys.systems.rabtriever.teacher import Reranker

F32 = NDArray[np.float32]
PLAIN: dict[str, Any] = {"additive": False, "standardise": False, "kl": "reverse", "kl_weight": 0.25}
STUDENTS: dict[str, dict[str, Any]] = {
    "student": {},
    "paper_student": PLAIN,
    "no_mul": {"combine": "none"},
    "no_kl": {"kl_weight": 0.0},
    "no_mse": {"mse_weight": 0.0},
    "contrastive": {"match": "contrastive"},
    "reverse_kl": {"kl": "reverse", "kl_weight": 1.0},
    "reverse_kl_same_w": {"kl": "reverse"},
    "forward_kl": {"kl": "forward"},
    "on_policy": {"rollout": "onpolicy"},
    "random_documents": {"rollout": "random"},
    "listwise": {"loss": "listwise"},
    "margin_mse": {"loss": "margin_mse"},
    "infonce": {"loss": "infonce"},
}
"""Changes of the student's setting by name: the method, the paper's literal predictor and weight, its ablations, the controls.
What equals the student itself is not trained again. Reverse KL also runs at w = 1, its best of 1, 4, 16, 100 on one seed."""
OTHERS = (
    "teacher",
    "teacher_eq9",
    "hyper",
    "classifier",
    "bm25",
    "dense",
    "bi_encoder",
    "late_interaction",
    "cross_encoder",
)
TAUGHT = ("teacher", "teacher_eq9", "hyper", "classifier")
"""Methods beside the students that use the teacher or its states."""
METHODS = (*STUDENTS, *OTHERS)
METRICS = ("recall@1", "recall@3", "recall@5", "recall@10", "mrr@10", "ndcg@10")
TOP, ASKED = 10, 50
"""The cross-encoder reads that many documents, the bi-encoder's best, for that many test queries: it is the dearest by far."""


@dataclass(frozen=True)
class Trained:
    """A problem with its teacher, what a student gets of it, test query states (n, d), and the teacher's own scores."""

    problem: Problem
    targets: LocalTargets
    frozen: Frozen
    test: torch.Tensor
    scores: F32
    eq9: F32


def examine(backbone: Backbone, problem: Problem, shortlist: int) -> Trained:
    """Let a trained teacher read and score everything.

    Args:
        shortlist: the teacher scores the frozen encoder's best so many documents of each test query; 0 means all.
    """
    reranker = Reranker(backbone)
    asked = joined(problem.train, problem.test)
    targets = LocalTargets(reranker, problem.documents, asked)
    queries, first, m = reranker.queries(asked), len(problem.train.length), len(problem.data.documents)
    frozen = Frozen(
        queries[:first], reranker.documents(problem.documents), backbone.head.weight.detach().float(), backbone.labels
    )
    n = len(problem.test.length)
    if shortlist and shortlist < m:
        chosen = baselines.dense(problem.data, load_base(MINILM)).argsort(1)[:, ::-1][:, :shortlist]
    else:
        chosen = np.broadcast_to(np.arange(m), (n, m))
    scores, eq9 = (np.full((n, m), -np.inf, dtype=np.float32) for _ in range(2))
    rows = max(1, 65_536 // chosen.shape[1])
    for start in range(0, n, rows):
        part = np.arange(start, min(n, start + rows))
        pairs = np.stack([np.repeat(part, chosen.shape[1]), chosen[part].reshape(-1)], 1)
        states = targets.take(pairs + np.array([first, 0]))
        scores[pairs[:, 0], pairs[:, 1]] = reranker.scores(states).numpy()
        eq9[pairs[:, 0], pairs[:, 1]] = reranker.scores(states, "paper_eq9").numpy()
    return Trained(problem, targets, frozen, queries[first:], scores, eq9)


def contest(
    setting: Setting, seed: int, trained: Trained, methods: list[str], fit: Callable[..., dict[str, torch.Tensor]],
    steps: int,
) -> dict[str, Any]:  # fmt: skip
    """Scores of all methods, measured: by method the values of each test query, CPU seconds, fidelity to the teacher."""
    problem, data = trained.problem, trained.problem.data
    base = load_base(setting.teacher.encoder if setting.teacher.model == "bridge" else MINILM)
    values: dict[str, dict[str, list[float | None]]] = {}
    cpu: dict[str, float] = {}
    fidelity: dict[str, dict[str, float]] = {}
    kept: dict[str, F32] = {}
    for method in methods:
        began, asked = time.process_time(), np.arange(len(data.test))
        if method in STUDENTS:
            changed = StudentSetting.of(setting.student.model_dump() | STUDENTS[method])
            if changed == setting.student and "student" in kept:
                values[method], cpu[method], fidelity[method] = values["student"], cpu["student"], fidelity["student"]
                continue
            learner = StudentLearner(changed, trained.frozen, problem.examples, trained.targets, seed)
            fit(lambda device, made=learner: made)
            predictor = learner.module
            scores = student_scores(predictor, trained.frozen, trained.test)
            fidelity[method] = agreement(scores, trained.scores) | energies(
                predictor, trained.frozen, trained.targets, problem
            )
        elif method in ("teacher", "teacher_eq9"):
            scores = trained.scores if method == "teacher" else trained.eq9
        elif method == "hyper":
            scores = controls.hyper_encoder(setting.student, trained.frozen, problem.examples, trained.test, seed)
        elif method == "classifier":
            scores = controls.classifier(trained.frozen.queries, problem.examples, trained.test, len(data.documents))
        elif method == "bm25":
            scores = baselines.bm25(data)
        elif method == "dense":
            scores = baselines.dense(data, base)
        elif method == "cross_encoder":
            asked = spread(len(data.test), ASKED)
            best = kept["bi_encoder"] if "bi_encoder" in kept else baselines.bi_encoder(data, base, seed, steps)
            shortlist = best[asked].argsort(1)[:, ::-1][:, :TOP].copy()
            scores = cross_encoder(
                replace(data, test=pick_queries(data.test, asked)), base, shortlist, seed, max(1, steps // 5)
            )
        else:
            train = baselines.bi_encoder if method == "bi_encoder" else baselines.late_interaction
            scores = train(data, base, seed, steps)
        cpu[method] = time.process_time() - began
        if method in ("student", "bi_encoder"):
            kept[method] = scores
        found = measure(scores, pick_queries(data.test, asked))
        values[method] = {name: [None] * len(data.test) for name in METRICS}
        for name in METRICS:
            for place, value in zip(asked, found[name], strict=True):
                values[method][name][place] = None if np.isnan(value) else float(value)
    return {
        "values": values, "cpu_s": cpu, "fidelity": fidelity, "documents": len(data.documents), "queries": len(data.test),
        "fixed": source_of(setting.data, 0) == source_of(setting.data, 1),
        "unseen": [bool(data.unseen[list(row)].all()) for row in data.test.relevant], "withheld": int(data.unseen.sum()),
        "name": data.name, "note": data.note, "width": trained.frozen.documents.shape[1],
    }  # fmt: skip


def agreement(student: F32, teacher: F32) -> dict[str, float]:
    """How alike two rankings are: share of queries with the same first document, and mean Kendall tau-b over documents."""
    from scipy.stats import kendalltau

    rows = spread(len(student), 200)
    taus = []
    for i in rows:
        both = np.isfinite(teacher[i])
        tau = kendalltau(student[i, both], teacher[i, both]).statistic
        taus.append(0.0 if np.isnan(tau) else float(tau))  # one side is constant: no order to agree with
    first = float(
        np.mean(
            [student[i][np.isfinite(teacher[i])].argmax() == teacher[i][np.isfinite(teacher[i])].argmax() for i in rows]
        )
    )
    return {"top1": first, "tau": float(np.mean(taus))}
