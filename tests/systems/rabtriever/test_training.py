"""Training of teacher and student through the shared loop: same bits, resumable, frozen teacher, and it learns."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raysys.runtime.config import JobConfig
from raysys.runtime.exact import Peers, module_state, trainable
from raysys.runtime.run import Run
from raysys.runtime.steps import Task, train_here
from raysys.runtime.train import TrainConfig, fit_here
from raysys.systems.rabtriever import losses
from raysys.systems.rabtriever.backbone import Backbone, BridgeBackbone, TokenBackbone, stack_parts
from raysys.systems.rabtriever.controls import classifier, hyper_encoder
from raysys.systems.rabtriever.examples import Examples
from raysys.systems.rabtriever.learners import Frozen, StudentLearner, TeacherLearner, start_predictor
from raysys.systems.rabtriever.metrics import measure
from raysys.systems.rabtriever.setting import StudentSetting, TeacherSetting, cosine
from raysys.systems.rabtriever.targets import LocalTargets
from raysys.systems.rabtriever.task import Problem, energies, freeze, student_scores
from raysys.systems.rabtriever.teacher import Reranker, digest

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


@pytest.fixture(scope="session")
def trained(rule: Problem) -> Trained:
    state = fit_here(None, partial(teacher_learner, rule, TEACHER), ONCE)
    backbone = bridge(rule)
    backbone.load_state_dict(state)
    reranker = Reranker(backbone)
    return Trained(rule, reranker, freeze(reranker, rule), LocalTargets(reranker, rule.documents, rule.train))


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    with Run.open(JobConfig(out=str(tmp_path), wandb=False), system="rabtriever", command="test") as opened:
        yield opened


def recall(scores: np.ndarray, problem: Problem) -> float:
    return float(measure(scores, problem.data.test)["recall@1"].mean())


def fitted_student(trained: Trained, setting: StudentSetting) -> Any:
    state = fit_here(None, partial(student_learner, trained, setting), ONCE)
    state.pop("own")
    predictor = start_predictor(setting, trained.frozen, trained.problem.examples, 0)
    predictor.load_state_dict(state)
    return predictor


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


def energy_of(predictor: Any, trained: Trained) -> dict[str, float]:
    return energies(predictor, trained.frozen, trained.targets, trained.problem, 20)


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


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


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


def test_the_step_size_rises_for_a_tenth_and_falls_to_zero() -> None:
    rates = [cosine(1.0, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert max(rates) == 1.0
    assert sorted(rates[10:], reverse=True) == rates[10:]
    assert 0 < rates[-1] < 1e-3
    assert cosine(1.0, 0, 1) == 1.0


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
