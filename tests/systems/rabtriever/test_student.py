"""The student: its loss, its searches, the same bits each time, and only the predictor trained."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from retriever_for_tests import (
    ONCE,
    STUDENT,
    TEACHER,
    Trained,
    energy_of,
    fitted_student,
    freeze,
    recall,
    same,
    student_learner,
    teacher_learner,
)

from raysys.data.retrieval import Queries, Retrieval
from raysys.runtime.exact import Peers, module_state, trainable
from raysys.runtime.steps import Task, train_here
from raysys.runtime.train import fit_here
from raysys.systems.rabtriever import controls, losses
from raysys.systems.rabtriever.controls import classifier, hyper_encoder
from raysys.systems.rabtriever.examples import Examples
from raysys.systems.rabtriever.learners import start_predictor
from raysys.systems.rabtriever.predictor import HyperPredictor
from raysys.systems.rabtriever.setting import StudentSetting
from raysys.systems.rabtriever.targets import LocalTargets
from raysys.systems.rabtriever.task import Problem, student_scores
from raysys.systems.rabtriever.teacher import Reranker


def test_a_student_of_states_alone_comes_near_the_closed_form_and_never_below_it(trained: Trained) -> None:  # (14)
    untrained = energy_of(start_predictor(STUDENT, trained.frozen, trained.problem.examples, 0), trained)
    found = energy_of(fitted_student(trained, STUDENT.with_values({"kl_weight": 0.0})), trained)
    assert found["oracle"] == pytest.approx(untrained["oracle"])
    assert found["oracle"] <= found["energy"] < 1.3 * found["oracle"] < 0.5 * untrained["energy"]


@pytest.mark.parametrize("changes", [
    {"loss": "infonce"}, {"loss": "listwise"}, {"loss": "margin_mse"}, {"kl": "forward"}, {"kl": "jsd", "rollout": "all"},
    {"combine": "film"}, {"match": "contrastive", "rollout": "random"}, {"kl_samples": 4},
])  # fmt: skip
def test_every_loss_and_rollout_learns_more_than_chance(trained: Trained, changes: dict[str, Any]) -> None:
    setting = STUDENT.with_values({"steps": 60, **changes})
    predictor = fitted_student(trained, setting)
    scores = student_scores(predictor, trained.frozen, trained.reranker.queries(trained.problem.test))
    assert recall(scores, trained.problem) > 3 / 12


def test_without_multiplication_the_student_is_chance(trained: Trained) -> None:  # (12)
    predictor = fitted_student(trained, STUDENT.with_values({"combine": "none", "steps": 5}))
    scores = student_scores(predictor, trained.frozen, trained.reranker.queries(trained.problem.test))
    assert recall(scores, trained.problem) == pytest.approx(1 / 12)


@pytest.mark.parametrize("rollout", ["all", "random", "onpolicy"])
@pytest.mark.parametrize("loss", ["jepa", "infonce"])
def test_two_trainings_of_a_student_end_with_the_same_bits(trained: Trained, rollout: str, loss: str) -> None:
    setting = STUDENT.with_values(
        {"steps": 8, "refresh": 3, "rollout": rollout, "loss": loss, "kl_samples": 2 if loss == "jepa" else 0}
    )
    one, two = (fit_here(None, partial(student_learner, trained, setting), ONCE) for _ in range(2))
    assert same(one, two)
    fresh = Trained(
        trained.problem, trained.reranker, trained.frozen,
        LocalTargets(trained.reranker, trained.problem.documents, trained.problem.train),
    )  # fmt: skip
    assert same(one, fit_here(None, partial(student_learner, fresh, setting), ONCE)), (
        "nor does it matter what is held already"
    )


def test_a_learner_asked_for_blocks_in_another_order_gives_the_same_losses(trained: Trained) -> None:
    setting = STUDENT.with_values({"steps": 6, "refresh": 2})
    forward, backward = (student_learner(trained, setting) for _ in range(2))
    for step in range(4):
        forward.before(step)
        backward.before(step)
        a = [forward.loss(step, block).item() for block in range(forward.blocks)]
        b = [backward.loss(step, block).item() for block in reversed(range(backward.blocks))]
        assert a == b[::-1]
        assert len(set(a)) == forward.blocks, "each block has examples of its own"


def test_a_loss_changes_no_buffer_and_a_search_is_repeated_alike(trained: Trained) -> None:
    learner = student_learner(trained, STUDENT)
    learner.before(0)
    own = learner.module.own.clone()
    learner.before(0)
    assert torch.equal(own, learner.module.own)
    state = {name: value.clone() for name, value in module_state(learner.module, trainable(learner.module)).items()}
    learner.loss(0, 1).backward()
    assert same(state, module_state(learner.module, trainable(learner.module)))
    assert own.shape == (len(trained.problem.examples), STUDENT.top)


def test_a_search_finds_each_querys_best_known_documents(trained: Trained) -> None:
    learner = student_learner(trained, STUDENT)
    learner.before(0)
    scores = student_scores(copy.deepcopy(learner.module), trained.frozen, trained.frozen.queries)[
        :, trained.problem.examples.known
    ]
    expected = np.sort(np.argsort(-scores, 1)[:, : STUDENT.top], 1)
    assert np.array_equal(np.sort(learner.module.own.numpy(), 1), expected)


def test_a_students_loss_is_weighted_mse_and_kl_and_a_weight_of_zero_leaves_the_other(trained: Trained) -> None:  # (20)
    base = STUDENT.with_values({"rollout": "random", "standardise": False})

    def parts(**changes: Any) -> float:
        return student_learner(trained, base.with_values(changes)).loss(3, 1).item()

    learner = student_learner(trained, base)
    n = base.batch // learner.blocks
    rows = learner.examples.queries(learner.seeds, 3, 1, n)
    found, _ = learner.examples.groups(learner.seeds, 3, 1, rows, base.group - 1)
    pairs = np.stack([np.repeat(rows, base.group), found.ravel()], 1)
    teacher = trained.reranker.states(trained.problem.documents, trained.problem.train, pairs).view(n, base.group, -1)
    with torch.no_grad():
        a, b = learner.module(trained.frozen.queries[rows])
        student = a[:, None] * trained.frozen.documents[torch.from_numpy(found)] + b[:, None]
        mse = torch.nn.functional.mse_loss(student, teacher).item()
        kl = losses.reverse_kl(student @ trained.frozen.head.T, teacher @ trained.frozen.head.T).item()
    assert parts(kl_weight=0.0) == pytest.approx(mse, rel=1e-5)
    assert parts(mse_weight=0.0, kl_weight=1.0) == pytest.approx(kl, rel=1e-4)
    assert parts(mse_weight=2.0, kl_weight=3.0) == pytest.approx(2 * mse + 3 * kl, rel=1e-4)
    with pytest.raises(ValueError, match="kl_weight: got 0"):
        StudentSetting(kl_weight=0, mse_weight=0)


def test_the_mse_is_in_units_of_the_teachers_variance_where_that_is_asked_for(trained: Trained) -> None:
    learner = student_learner(trained, STUDENT)
    assert (learner.variance > 0).all()
    for network in (learner.module.slope, learner.module.shift):
        torch.nn.init.zeros_(network[-1].weight)
        torch.nn.init.zeros_(network[-1].bias)
    learner.setting = STUDENT.with_values({"kl_weight": 0.0})
    with torch.no_grad():  # a state of zero everywhere: the second moment over the variance
        found = learner.loss(3, 1).item()
    assert found > 1 - 0.3
    plain = student_learner(trained, STUDENT.with_values({"standardise": False}))
    assert torch.equal(plain.variance, torch.ones(16))


def test_only_the_predictor_is_trained(trained: Trained) -> None:  # (4)
    learner = student_learner(trained, STUDENT)
    learner.before(0)
    learner.loss(0, 0).backward()
    d, h = 16, 32
    assert sum(p.numel() for p in trainable(learner.module).values()) == 2 * (2 * d * h + h + d)
    assert all(p.grad is not None for p in learner.module.parameters())
    for tensor in (learner.frozen.queries, learner.frozen.documents, learner.frozen.head):
        assert not tensor.requires_grad


def test_a_paper_setting_trains_the_literal_form(trained: Trained) -> None:
    setting = STUDENT.with_values({"additive": False, "standardise": False, "rollout": "all", "kl_weight": 0.25})
    learner = student_learner(trained, setting)
    assert learner.module.shift is None
    assert torch.equal(learner.z, trained.frozen.documents)
    assert learner.others == 11
    assert torch.isfinite(learner.loss(0, 0))


def test_a_student_in_bfloat16_still_compares_answers_in_float32(trained: Trained) -> None:
    learner = student_learner(trained, STUDENT.with_values({"rollout": "random"}))
    expected = learner.loss(0, 0).item()
    with torch.autocast("cpu", torch.bfloat16):
        found = learner.loss(0, 0)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected, rel=0.05)


def test_a_pool_of_one_document_trains_both(rule: Problem) -> None:
    queries = type(rule.data.test)(("a", "b"), ("a", "b"), ((0,), (0,)), ((1,), (1,)), np.full(2, -1))
    data = type(rule.data)("one", "none", ("0",), ("0",), queries, queries, np.array([False]), "real")
    parts = (part.pick(torch.arange(n)) for part, n in ((rule.documents, 1), (rule.train, 2), (rule.train, 2)))
    one = Problem(data, Examples.of(data), *parts)
    teacher = teacher_learner(one, TEACHER, "cpu")
    assert torch.isfinite(teacher.loss(0, 0))
    reranker = Reranker(teacher.module)
    trained = Trained(one, reranker, freeze(reranker, one), LocalTargets(reranker, one.documents, one.train))
    for rollout in ("all", "random", "onpolicy"):
        learner = student_learner(trained, STUDENT.with_values({"rollout": rollout}))
        learner.before(0)
        assert torch.isfinite(learner.loss(0, 0))
    assert student_scores(learner.module, trained.frozen, trained.frozen.queries).shape == (2, 1)


def test_controls_learn_the_rule_on_the_same_states(trained: Trained) -> None:
    problem = trained.problem
    test = trained.reranker.queries(problem.test)
    assert recall(classifier(trained.frozen.queries, problem.examples, test, 12), problem) > 0.9
    setting = STUDENT.with_values({"steps": 80})
    scores = hyper_encoder(setting, trained.frozen, problem.examples, test, 0)
    assert scores.shape == (48, 12)
    assert recall(scores, problem) > 0.6
    assert np.array_equal(scores, hyper_encoder(setting, trained.frozen, problem.examples, test, 0))


def test_the_hyper_encoder_scores_documents_in_slices(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    test = trained.reranker.queries(trained.problem.test)
    setting = STUDENT.with_values({"steps": 2})
    whole = hyper_encoder(setting, trained.frozen, trained.problem.examples, test, 0)
    sizes, forward = [], HyperPredictor.forward

    def seen(self: HyperPredictor, queries: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        if torch.is_inference_mode_enabled():
            sizes.append(z.shape[1])
        return forward(self, queries, z)

    monkeypatch.setattr(HyperPredictor, "forward", seen)
    monkeypatch.setattr(controls, "DOCUMENTS", 5)
    sliced = hyper_encoder(setting, trained.frozen, trained.problem.examples, test, 0)
    assert sizes == [5, 5, 2] * (len(sizes) // 3)
    np.testing.assert_allclose(sliced, whole, atol=1e-5)


def several(right: list[tuple[int, ...]], m: int) -> Examples:
    """Training queries with these right documents."""
    return Examples.of(
        Retrieval(
            "several", "none", tuple(f"d{i}" for i in range(m)), tuple(f"document {i}" for i in range(m)),
            *[Queries(tuple(f"q{i}" for i in range(len(right))), tuple(f"query {i}" for i in range(len(right))), tuple(right),
                      tuple((1,) * len(row) for row in right), np.full(len(right), -1))] * 2,
            np.zeros(m, bool), "real",
        )
    )  # fmt: skip


def test_the_classifier_learns_every_right_document_of_a_query() -> None:
    train = torch.eye(3).repeat(20, 1)
    scores = classifier(train, several([(0, 3), (1,), (2, 4)] * 20, 6), torch.eye(3), 6)
    assert [set(np.argsort(-row)[:2].tolist()) for row in scores[[0, 2]]] == [{0, 3}, {2, 4}]
    np.testing.assert_allclose(scores[0, 0], scores[0, 3], atol=1e-3)
    assert scores[1].argmax() == 1
    assert (scores[:, 5] == -np.inf).all()


def test_a_classifier_of_one_class_is_sure_of_it() -> None:
    scores = classifier(torch.eye(3), several([(1,)] * 3, 4), torch.eye(3), 4)
    assert np.array_equal(scores, np.tile(np.where(np.arange(4) == 1, 0.0, -np.inf), (3, 1)))


def test_a_checkpoint_of_the_first_steps_holds_an_empty_search(trained: Trained) -> None:
    learner = student_learner(trained, STUDENT.with_values({"rollout": "random"}))
    state = module_state(learner.module, trainable(learner.module))
    assert state["module/own"].shape == (0, 0)
    found = train_here(
        Task(partial(student_learner, trained, STUDENT.with_values({"steps": 1})), ONCE),
        "cpu",
        Peers(),
        lambda *_: None,
    )
    assert found["module/own"].shape == (240, 4)
