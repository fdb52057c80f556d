"""A small teacher and what trains a student of it, for several test files.

Shapes: n queries, m documents.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from raysys.runtime.train import TrainConfig, fit_here
from raysys.systems.rabtriever.backbone import Backbone, BridgeBackbone
from raysys.systems.rabtriever.learners import Frozen, StudentLearner, TeacherLearner, start_predictor
from raysys.systems.rabtriever.metrics import measure
from raysys.systems.rabtriever.setting import StudentSetting, TeacherSetting
from raysys.systems.rabtriever.targets import LocalTargets
from raysys.systems.rabtriever.task import Problem, energies
from raysys.systems.rabtriever.teacher import Reranker

TEACHER = TeacherSetting(width=16, layers=1, steps=180, batch=32, negatives=5, lr=1e-2, auxiliary=2.0)
STUDENT = StudentSetting(
    combine="mul", hidden=32, kl="reverse", kl_weight=4.0, rollout="onpolicy", steps=200, batch=32, group=6, top=4, refresh=30,
    lr=1e-2,
)  # fmt: skip
ONCE = TrainConfig()


@dataclass
class Trained:
    """A problem, its teacher, and what a student gets of it."""

    problem: Problem
    reranker: Reranker
    frozen: Frozen
    targets: LocalTargets


def bridge(problem: Problem, seed: int = 0) -> BridgeBackbone:
    torch.manual_seed(seed)
    return BridgeBackbone(problem.documents.units.shape[-1], 16, layers=1, heads=2)


def teacher_learner(
    problem: Problem, setting: TeacherSetting, device: str, preferences: bool = False, start: Any = None
) -> TeacherLearner:
    backbone: Backbone = bridge(problem) if start is None else copy.deepcopy(start).requires_grad_(True)
    return TeacherLearner(setting, backbone, problem.examples, problem.documents, problem.train, 0, preferences)


def student_learner(trained: Trained, setting: StudentSetting, device: str = "cpu") -> StudentLearner:
    return StudentLearner(setting, trained.frozen, trained.problem.examples, trained.targets, 0, device)


def recall(scores: np.ndarray, problem: Problem) -> float:
    return float(measure(scores, problem.data.test)["recall@1"].mean())


def fitted_student(trained: Trained, setting: StudentSetting) -> Any:
    state = fit_here(None, partial(student_learner, trained, setting), ONCE)
    state.pop("own")
    predictor = start_predictor(setting, trained.frozen, trained.problem.examples, 0)
    predictor.load_state_dict(state)
    return predictor


def energy_of(predictor: Any, trained: Trained) -> dict[str, float]:
    return energies(predictor, trained.frozen, trained.targets, trained.problem, 20)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def freeze(reranker: Reranker, problem: Problem) -> Frozen:
    """What a student gets of its teacher."""
    backbone = reranker.backbone
    head = backbone.head.weight.detach().float()
    return Frozen(reranker.queries(problem.train), reranker.documents(problem.documents), head, backbone.labels)
