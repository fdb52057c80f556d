"""Training of the teacher and of its student through the shared loop: it learns, and goes on after a crash."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from retriever_for_tests import (
    ONCE,
    STUDENT,
    TEACHER,
    Trained,
    bridge,
    energy_of,
    fitted_student,
    recall,
    same,
    student_learner,
    teacher_learner,
)

from raysys.runtime.config import JobConfig
from raysys.runtime.run import Run
from raysys.runtime.train import TrainConfig, fit_here
from raysys.systems.rabtriever.backbone import TokenBackbone, stack_parts
from raysys.systems.rabtriever.examples import Examples
from raysys.systems.rabtriever.learners import TeacherLearner
from raysys.systems.rabtriever.setting import TeacherSetting, cosine
from raysys.systems.rabtriever.task import Problem, student_scores
from raysys.systems.rabtriever.teacher import Reranker, digest


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    with Run.open(JobConfig(out=str(tmp_path), wandb=False), system="rabtriever", command="test") as opened:
        yield opened


def test_a_small_teacher_learns_the_rule_and_its_student_recovers_it(trained: Trained) -> None:
    problem, chance = trained.problem, 1 / 12
    teacher = recall(trained.reranker.matrix(problem.documents, problem.test), problem)
    assert teacher > 0.9
    untrained = recall(Reranker(bridge(problem)).matrix(problem.documents, problem.test), problem)
    assert untrained < 4 * chance
    before = digest(trained.reranker.backbone)
    predictor = fitted_student(trained, STUDENT)
    assert digest(trained.reranker.backbone) == before  # (4)
    assert all(p.grad is None for p in trained.reranker.backbone.parameters())
    student = recall(student_scores(predictor, trained.frozen, trained.reranker.queries(problem.test)), problem)
    assert student >= 0.85 * teacher
    assert energy_of(predictor, trained)["oracle"] <= energy_of(predictor, trained)["energy"]  # (14)


class Stopped(Exception):
    """A crash on purpose."""


def stops_at(make: Callable[[str], Any], step: int, device: str) -> Any:
    """The learner, which dies in the given step."""
    learner = make(device)
    loss = learner.loss

    def dies(now: int, block: int) -> torch.Tensor:
        if now == step:
            raise Stopped
        return loss(now, block)

    learner.loss = dies
    return learner


@pytest.mark.parametrize("kind", ["teacher", "student", "dpo", "random"])
def test_a_training_that_is_resumed_in_the_middle_of_two_searches_ends_with_the_same_bits(
    kind: str, trained: Trained, run: Run
) -> None:
    if kind in ("student", "random"):
        rollout = "onpolicy" if kind == "student" else "random"
        setting = STUDENT.with_values({"steps": 14, "refresh": 5, "rollout": rollout, "kl_samples": 2})
        make: Any = partial(student_learner, trained, setting)
    else:
        start = trained.reranker.backbone if kind == "dpo" else None
        short = TEACHER.with_values({"steps": 14, "dpo_steps": 14})
        make = partial(teacher_learner, trained.problem, short, preferences=kind == "dpo", start=start)
    config = TrainConfig(checkpoint_every=7)  # between the searches of steps 5 and 10
    whole = fit_here(run.stage("whole"), make, config, log_every=1)
    with pytest.raises(Stopped):
        fit_here(run.stage("stopped"), partial(stops_at, make, 9), config, log_every=1)
    assert same(fit_here(run.stage("stopped"), make, config, log_every=1), whole)
    if kind == "student":
        assert whole["own"].shape == (240, 4)
        no_search = fit_here(None, partial(student_learner, trained, setting.with_values({"refresh": 14})), ONCE)
        assert not same(no_search, whole), "the second search must matter for this test"


def test_preferences_start_at_log_two_and_raise_the_margin(trained: Trained) -> None:
    setting = TEACHER.with_values({"dpo_steps": 10, "auxiliary": 0.0, "lr": 5e-3})
    make = partial(teacher_learner, trained.problem, setting, preferences=True, start=trained.reranker.backbone)
    learner = make("cpu")
    assert learner.loss(0, 0).item() == pytest.approx(np.log(2), abs=1e-6)
    assert learner.steps == 10
    assert learner.learning_rate(3) == pytest.approx(cosine(5e-4, 3, 10))
    reference = digest(learner.reference)
    backbone = bridge(trained.problem)
    backbone.load_state_dict(fit_here(None, make, ONCE))
    assert digest(learner.reference) == reference == digest(trained.reranker.backbone)
    after = make("cpu")
    after.module.load_state_dict(backbone.state_dict())
    assert np.mean([after.loss(100 + i, 0).item() for i in range(5)]) < np.log(2) - 1e-4


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_a_language_model_learns_answers_and_next_tokens(kind: str, cases: Any, rule: Problem) -> None:
    case = cases(kind)
    assert isinstance(case.backbone, TokenBackbone)
    setting = TeacherSetting(model=kind, steps=40, batch=8, negatives=2, lr=5e-3, max_document=8)
    documents = stack_parts([torch.tensor([1, 2, 3 + i, 2][: 3 + i % 2]) for i in range(12)])
    queries = stack_parts([torch.tensor([5, 20 + i % 12, 6]) for i in range(240)])

    def make(device: str) -> TeacherLearner:
        return TeacherLearner(setting, copy.deepcopy(case.backbone).train(), rule.examples, documents, queries, 0)

    learner = make("cpu")
    before = np.mean([learner.loss(s, 0).item() for s in range(90, 95)])
    learner.module.load_state_dict(fit_here(None, make, ONCE), strict=False)
    assert np.mean([learner.loss(s, 0).item() for s in range(90, 95)]) < 0.7 * before


def test_all_negatives_are_all_other_known_documents(rule: Problem) -> None:
    learner = teacher_learner(rule, TEACHER.with_values({"negatives": 0}), "cpu")
    assert learner.others == 11
    assert torch.isfinite(learner.loss(0, 0))


def test_a_teacher_learns_with_several_right_documents_per_query(rule: Problem) -> None:
    relevant = tuple((i % 12, (i + 5) % 12) for i in range(240))
    data = rule.data.train
    several = type(data)(data.ids, data.texts, tuple(tuple(sorted(r)) for r in relevant), ((1, 1),) * 240, data.itself)
    examples = Examples.of(type(rule.data)(**{**rule.data.__dict__, "train": several}))
    learner = TeacherLearner(TEACHER, bridge(rule), examples, rule.documents, rule.train, 0)
    rows = examples.queries(learner.seeds, 0, 0, 8)
    _, also = examples.groups(learner.seeds, 0, 0, rows, 5)
    assert also.any(), "some of the others are right, too"
    assert torch.isfinite(learner.loss(0, 0))


def test_the_step_size_rises_for_a_tenth_and_falls_to_zero() -> None:
    rates = [cosine(1.0, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert max(rates) == 1.0
    assert sorted(rates[10:], reverse=True) == rates[10:]
    assert 0 < rates[-1] < 1e-3
    assert cosine(1.0, 0, 1) == 1.0
