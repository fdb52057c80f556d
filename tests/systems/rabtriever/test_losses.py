"""Every loss against its closed form (spec 5.3, checks 16 to 20)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from raysys.systems.rabtriever import losses

relaxed = settings(deadline=None, max_examples=40)


row = st.lists(st.floats(-8, 8), min_size=4, max_size=4)


def rows(*values: list[float]) -> list[Tensor]:
    return [torch.tensor([v], dtype=torch.float64) for v in values]


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(-1).mean()


@relaxed
@given(row, row)
def test_reverse_kl_is_the_students_and_forward_kl_the_teachers_expectation(
    a: list[float], b: list[float]
) -> None:  # (16)
    student, teacher = rows(a, b)
    torch.testing.assert_close(losses.reverse_kl(student, teacher), kl(student.softmax(-1), teacher.softmax(-1)))
    torch.testing.assert_close(losses.forward_kl(student, teacher), kl(teacher.softmax(-1), student.softmax(-1)))
    assert losses.forward_kl(student, teacher) == losses.reverse_kl(teacher, student)
    assert losses.reverse_kl(student, teacher) >= -1e-12


@relaxed
@given(row, st.floats(-5, 5))
def test_divergences_of_a_distribution_from_itself_are_zero(a: list[float], constant: float) -> None:  # (16)
    (logits,) = rows(a)
    for divergence in (losses.reverse_kl, losses.forward_kl, losses.jensen_shannon):
        assert abs(divergence(logits, logits + constant)) < 1e-12


@relaxed
@given(row, row, st.floats(0.05, 0.95))
def test_jsd_is_symmetric_at_a_half_and_lies_between_zero_and_log_two(
    a: list[float], b: list[float], beta: float
) -> None:  # (16)
    student, teacher = rows(a, b)
    torch.testing.assert_close(losses.jensen_shannon(student, teacher), losses.jensen_shannon(teacher, student))
    p, q = student.softmax(-1), teacher.softmax(-1)
    m = beta * q + (1 - beta) * p
    found = losses.jensen_shannon(student, teacher, beta)
    torch.testing.assert_close(found, beta * kl(q, m) + (1 - beta) * kl(p, m), atol=1e-6, rtol=1e-5)
    assert -1e-7 <= found <= math.log(2)


def test_jsd_over_beta_becomes_forward_kl_and_over_one_less_beta_reverse_kl() -> None:  # (16)
    student, teacher = rows([0.3, -1.0, 2.0, 0.0], [1.0, 0.5, -0.7, 0.2])
    small = 1e-4
    forward, reverse = losses.forward_kl(student, teacher), losses.reverse_kl(student, teacher)
    assert (losses.jensen_shannon(student, teacher, small) / small).item() == pytest.approx(forward.item(), rel=5e-3)
    assert (losses.jensen_shannon(student, teacher, 1 - small) / small).item() == pytest.approx(
        reverse.item(), rel=5e-3
    )
    assert abs(forward - reverse) > 0.1, "the two limits must differ for the test to tell them apart"
    for end in (0.0, 1.0):
        assert abs(losses.jensen_shannon(student, teacher, end)) < 1e-12


@relaxed
@given(st.floats(-6, 6), st.floats(-6, 6))
def test_binary_kl_and_its_gradients_have_their_closed_forms(a: float, b: float) -> None:  # (17)
    z_s = torch.tensor(a, dtype=torch.float64, requires_grad=True)
    z_t = torch.tensor(b, dtype=torch.float64)
    zero = torch.zeros_like(z_t)
    p_s, p_t = torch.sigmoid(z_s.detach()), torch.sigmoid(z_t)
    student, teacher = torch.stack([z_s, zero]), torch.stack([z_t, zero])
    reverse = losses.reverse_kl(student, teacher)
    torch.testing.assert_close(
        reverse.detach(), p_s * (p_s / p_t).log() + (1 - p_s) * ((1 - p_s) / (1 - p_t)).log(), atol=1e-9, rtol=1e-6
    )
    (gradient,) = torch.autograd.grad(reverse, z_s)
    torch.testing.assert_close(gradient, p_s * (1 - p_s) * (z_s.detach() - z_t), atol=1e-10, rtol=1e-7)
    (gradient,) = torch.autograd.grad(losses.forward_kl(torch.stack([z_s, zero]), teacher), z_s)
    torch.testing.assert_close(gradient, p_s - p_t, atol=1e-10, rtol=1e-7)


def test_reverse_kls_gradient_vanishes_for_a_student_that_always_says_f_and_forwards_does_not() -> None:  # (17)
    z_s = torch.tensor(-30.0, dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([3.0, 0.0], dtype=torch.float64)
    (reverse,) = torch.autograd.grad(losses.reverse_kl(torch.stack([z_s, torch.zeros_like(z_s)]), teacher), z_s)
    (forward,) = torch.autograd.grad(losses.forward_kl(torch.stack([z_s, torch.zeros_like(z_s)]), teacher), z_s)
    assert abs(reverse) < 1e-10
    assert forward < -0.9


def test_the_sampled_estimator_has_the_exact_gradient_as_its_mean() -> None:  # (18)
    count = 100_000
    logits = torch.tensor([[0.5, -1.0, 1.5, 0.0, -0.3, 0.9]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[1.0, 0.2, -0.5, 0.0, 0.7, -1.2]], dtype=torch.float64)
    (exact,) = torch.autograd.grad(losses.reverse_kl(logits, teacher), logits)
    drawn = torch.Generator().manual_seed(0)
    (mean,) = torch.autograd.grad(losses.sampled_reverse_kl(logits, teacher, count, drawn), logits)
    p = logits.detach().softmax(-1)[0]
    r = (logits.detach().log_softmax(-1) - teacher.log_softmax(-1))[0]
    each = r[:, None] * (torch.eye(6, dtype=torch.float64) - p)  # the gradient that answer a gives, with chance p_a
    torch.testing.assert_close((p[:, None] * each).sum(0), exact[0])
    error = ((p[:, None] * each**2).sum(0) - exact[0] ** 2).sqrt() / count**0.5
    assert ((mean[0] - exact[0]).abs() < 4 * error).all()
    assert (error < 0.01).all()


def test_the_sampled_estimator_is_a_function_of_its_generator() -> None:
    student, teacher = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    values = [losses.sampled_reverse_kl(student, teacher, 4, torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert values[0] == values[1] != values[2]


def test_reverse_kl_seeks_one_mode_and_forward_kl_covers_both() -> None:  # (19)
    x = torch.linspace(-20, 20, 1601, dtype=torch.float64)
    target = torch.logaddexp(-((x + 3) ** 2) / 2, -((x - 3) ** 2) / 2)
    found = {}
    for name, divergence in (("forward", losses.forward_kl), ("reverse", losses.reverse_kl)):
        values = torch.tensor([2.0, 0.0], dtype=torch.float64, requires_grad=True)  # mean, log variance
        optimizer = torch.optim.LBFGS([values], max_iter=200, line_search_fn="strong_wolfe")

        def closure(
            values: Tensor = values, optimizer: torch.optim.LBFGS = optimizer, divergence: object = divergence
        ) -> Tensor:
            optimizer.zero_grad()
            loss = divergence(-((x - values[0]) ** 2) / (2 * values[1].exp()), target)  # type: ignore[operator]
            loss.backward()
            return loss

        optimizer.step(closure)  # type: ignore[no-untyped-call, arg-type]
        found[name] = (values[0].item(), values[1].exp().item())
    assert found["forward"] == (pytest.approx(0, abs=1e-3), pytest.approx(10, rel=1e-3))
    assert found["reverse"][0] == pytest.approx(3, abs=0.1)
    assert found["reverse"][1] == pytest.approx(1, abs=0.15)


def test_scaled_mse_with_variance_one_is_the_mean_squared_error_and_does_not_see_units() -> None:
    student, teacher = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    one = torch.ones(4)
    torch.testing.assert_close(losses.scaled_mse(student, teacher, one), torch.nn.functional.mse_loss(student, teacher))
    scale = torch.tensor([1.0, 300.0, 0.01, 7.0])
    torch.testing.assert_close(
        losses.scaled_mse(student * scale, teacher * scale, scale**2), losses.scaled_mse(student, teacher, one)
    )
    assert losses.scaled_mse(student, teacher, one).shape == ()


@relaxed
@given(
    st.lists(st.floats(-9, 9), min_size=5, max_size=5),
    st.lists(st.floats(-9, 9), min_size=5, max_size=5),
    st.floats(-9, 9),
)
def test_losses_over_a_list_ignore_a_constant_of_the_query(a: list[float], b: list[float], constant: float) -> None:
    student, teacher = rows(a, b)
    for loss in (losses.listwise_kl, losses.margin_mse):
        torch.testing.assert_close(
            loss(student + constant, teacher - constant), loss(student, teacher), atol=1e-9, rtol=1e-9
        )
        assert loss(teacher + constant, teacher).abs() < 1e-9
    none = torch.zeros(1, 5, dtype=torch.bool)
    torch.testing.assert_close(
        losses.info_nce(student + constant, none), losses.info_nce(student, none), atol=1e-9, rtol=1e-9
    )


def test_listwise_kl_is_that_of_the_documents_of_a_query() -> None:
    student, teacher = rows([0.1, 2.0, -1.0, 0.0], [1.0, 1.5, -2.0, 0.3])
    torch.testing.assert_close(
        losses.listwise_kl(student, teacher, 2.0), kl((teacher / 2).softmax(-1), (student / 2).softmax(-1))
    )


def test_margin_mse_compares_margins_of_the_first_document() -> None:
    student, teacher = rows([3.0, 1.0, 0.0], [2.0, 1.5, 0.5])
    assert losses.margin_mse(student, teacher).item() == pytest.approx(((2 - 0.5) ** 2 + (3 - 1.5) ** 2) / 2)


def test_info_nce_is_the_first_documents_share_and_other_positives_do_not_count() -> None:
    (scores,) = rows([1.0, 2.0, 5.0])
    excluded = torch.tensor([[False, False, True]])
    assert losses.info_nce(scores, excluded).item() == pytest.approx(math.log(1 + math.e))
    assert losses.info_nce(scores[:, :1], excluded[:, :1]) == 0, "a pool of one document"


def test_contrastive_states_are_best_where_each_state_is_the_teachers_own() -> None:
    teacher = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    right = losses.contrastive_states(teacher * 3, teacher)
    wrong = losses.contrastive_states(teacher.flip(1), teacher)
    same = losses.contrastive_states(torch.ones_like(teacher), torch.ones_like(teacher))
    assert right < same < wrong
    assert same.item() == pytest.approx(math.log(5))


@relaxed
@given(st.lists(st.floats(-9, 9), min_size=4, max_size=4), st.booleans())
def test_the_answer_loss_is_minus_the_log_probability_of_the_right_label_among_all_tokens(
    logits: list[float], positive: bool
) -> None:
    given_logits = torch.tensor([logits], dtype=torch.float64)
    expected = -given_logits.softmax(-1)[0, 2 if positive else 1].log()
    found = losses.answer_loss(given_logits, torch.tensor([positive]), (2, 1))
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-6)


@relaxed
@given(st.lists(st.floats(-9, 9), min_size=3, max_size=3), st.floats(0.01, 2))
def test_preferences_at_the_reference_cost_log_two_and_pull_positives_up_and_others_down(
    values: list[float], beta: float
) -> None:
    (odds,) = rows(values)
    odds.requires_grad_(True)
    positive = torch.tensor([[True, False, True]])
    loss = losses.preference_loss(odds, odds.detach(), positive, beta)
    assert loss.item() == pytest.approx(math.log(2))
    (gradient,) = torch.autograd.grad(loss, odds)
    torch.testing.assert_close(gradient, torch.tensor([[-1.0, 1.0, -1.0]], dtype=torch.float64) * beta / 6)


@relaxed
@given(st.integers(0, 1000))
def test_a_loss_is_the_mean_over_its_rows(seed: int) -> None:
    drawn = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(3, 4, generator=drawn, dtype=torch.float64) for _ in range(2))
    for loss in (losses.reverse_kl, losses.forward_kl, losses.jensen_shannon, losses.listwise_kl, losses.margin_mse):
        each = torch.stack([loss(student[i : i + 1], teacher[i : i + 1]) for i in range(3)])
        torch.testing.assert_close(loss(student, teacher), each.mean())
