"""Balance of a mixture of experts: the rule as a gradient, auxiliary losses and measures in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from raysys.nn import balance
from raysys.nn.balance import max_violation, parameter_groups
from raysys.nn.moe import MoE, Routed, loads, violation

E, K, WIDTH = 16, 2, 12


def layer(**options: object) -> MoE:
    torch.manual_seed(4)
    return MoE(WIDTH, E, K, 4, 6, **options)  # type: ignore[arg-type]


def stream(n: int, seed: int) -> Tensor:
    """Tokens with a mean, so that some experts are chosen far too often."""
    return torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(seed)) + torch.linspace(-1, 1, WIDTH)


def uniform(n: int = 32) -> Routed:
    chosen = (torch.arange(n)[:, None] * K + torch.arange(K)) % E
    logits = torch.zeros(n, E)
    return Routed(chosen, torch.full((n, K), 1 / K), logits.softmax(-1), logits, None)


@pytest.mark.parametrize("clip", [None, 1e-3])
def test_adamw_on_the_balance_gradient_is_the_sign_rule(clip: float | None) -> None:
    moe, expected, speed = layer(), torch.zeros(E), 3e-3
    moe.router.requires_grad_(False)
    optimizer = torch.optim.AdamW(balance.parameter_groups(moe, rate=1e-2, speed=speed))
    for step in range(20):
        for half in range(2):  # two micro-batches or workers: gradients add up, so counts do
            y, _ = moe(stream(64, 2 * step + half))
            y.square().mean().backward()
        chosen = torch.cat([moe.route(stream(64, 2 * step + half)).experts for half in range(2)])
        c = torch.bincount(chosen.reshape(-1), minlength=E).double()
        expected += speed * torch.sign(c.mean() - c).float()
        others = [p for p in moe.parameters() if p is not moe.bias and p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in others])  # type: ignore[misc]
        assert torch.nn.utils.get_total_norm([p.grad for p in (*others, moe.bias)]) == norm  # type: ignore[misc]
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(moe.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        assert float((moe.bias - expected).abs().max()) < 1e-7
    assert float(expected.abs().max()) > 10 * speed


def test_the_gradient_is_the_excess_of_counted_tokens_whatever_the_loss() -> None:
    moe, x = layer(), stream(50, 0)
    counted = torch.arange(50) % 3 > 0
    y, routed = moe(x, counted=counted, active=torch.arange(50) % 2 + 1)
    (y.sum() * 17).backward()
    c = loads(routed, E).double()
    assert int(c.sum()) == int((routed.experts[counted] >= 0).sum())
    assert torch.equal(moe.bias.grad, ((c - c.mean()) * 2.0**-40).float())


def test_evaluation_and_an_unbalanced_layer_have_no_such_gradient() -> None:
    for moe in (layer().eval(), layer(balanced=False)):
        moe(stream(9, 0))[0].sum().backward()
        assert moe.bias.grad is None


def test_checkpointed_activations_count_once() -> None:
    moe, x = layer(), stream(50, 0).requires_grad_()
    moe(x)[0].sum().backward()
    once, moe.bias.grad = moe.bias.grad, None
    torch.utils.checkpoint.checkpoint(lambda x: moe(x)[0], x, use_reentrant=False).sum().backward()
    assert torch.equal(moe.bias.grad, once)


def test_the_bias_makes_a_stationary_stream_uniform() -> None:
    """Most loaded expert over the mean, 4000 fresh tokens: 4.1 too much before, 0.07 after; entropy 0.9997."""
    moe = layer()

    def violation(seed: int) -> float:
        return float(balance.max_violation(loads(moe.route(stream(4000, seed)), E)))

    before = violation(1001)
    optimizer = torch.optim.AdamW(balance.parameter_groups(moe, rate=1.0, speed=5e-3)[-1:])
    for step in range(200):
        for group in optimizer.param_groups:
            group["lr"] = group["lr_scale"] * (1 - step / 200)
        moe(stream(256, step))[0].sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = violation(1002)
    assert before > 1.5
    assert after < 0.2
    entropy = balance.normalized_entropy(loads(moe.route(stream(4000, 7)), E))
    assert float(entropy) > 0.995


def test_groups_hold_each_trainable_parameter_once_with_its_own_rule() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), layer(), layer(balanced=False))
    matrices, vectors, biases = balance.parameter_groups(model, rate=1e-2, speed=1e-4, weight_decay=0.2)
    assert {id(p) for g in (matrices, vectors, biases) for p in g["params"]} == {
        id(p) for p in model.parameters() if p.requires_grad
    }
    assert biases["params"] == [model[1].bias]
    assert (biases["betas"], biases["eps"], biases["weight_decay"]) == ((0.0, 0.0), 1e-30, 0.0)
    assert biases["lr_scale"] == pytest.approx(1e-2)
    assert biases["lr"] == pytest.approx(1e-4)
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.2, 0.0)
    assert vectors["params"] == [model[0].bias]


def test_the_switch_loss_of_a_uniform_router_is_exactly_one() -> None:
    assert float(balance.switch_loss(uniform(), E)) == 1.0


def test_the_switch_loss_of_one_expert_for_all_is_the_number_of_experts() -> None:
    logits = torch.full((20, E), -1e4)
    logits[:, 3] = 0
    routed = Routed(torch.full((20, 1), 3), torch.ones(20, 1), logits.softmax(-1), logits, None)
    assert float(balance.switch_loss(routed, E)) == pytest.approx(E)


def test_the_switch_loss_pushes_against_the_loaded_expert_and_skips_uncounted_tokens() -> None:
    logits = torch.zeros(8, E, requires_grad=True)
    chosen = torch.zeros(8, 1, dtype=torch.int64)
    chosen[4:] = 1
    routed = Routed(chosen, torch.ones(8, 1), logits.softmax(-1), logits, torch.arange(8) < 4)
    balance.switch_loss(routed, E).backward()
    assert logits.grad is not None
    assert (logits.grad[:4, 0] > 0).all()
    assert (logits.grad[:4, 1:] < 0).all()
    assert not logits.grad[4:].any()


def test_the_z_loss_is_its_closed_form() -> None:
    assert float(balance.z_loss(torch.zeros(5, E))) == pytest.approx(math.log(E) ** 2)
    assert float(balance.z_loss(torch.zeros(0, E))) == 0.0


@given(m=st.integers(1, E), each=st.integers(1, 50))
def test_entropy_and_violation_of_a_load_on_m_experts(m: int, each: int) -> None:
    counts = torch.tensor([each] * m + [0] * (E - m))
    assert float(balance.normalized_entropy(counts)) == pytest.approx(math.log(m) / math.log(E), abs=1e-12)
    assert float(balance.max_violation(counts)) == pytest.approx(E / m - 1)


def test_measures_take_a_stack_of_layers() -> None:
    counts = torch.tensor([[4, 4, 4, 4], [16, 0, 0, 0]])
    assert balance.normalized_entropy(counts).tolist() == [1.0, 0.0]
    assert balance.max_violation(counts).tolist() == [0.0, 3.0]


def test_overlap_of_the_most_used_quarter() -> None:
    a = torch.arange(16)  # top: 12..15
    assert balance.top_overlap(a, a) == 1.0
    assert balance.top_overlap(a, a.flip(0)) == 0.0
    b = torch.tensor([0] * 10 + [9, 9, 0, 0, 9, 9])  # top: 10, 11, 14, 15
    assert balance.top_overlap(a, b) == pytest.approx(2 / 6)


def test_the_load_of_pools_is_balanced_within_each():
    """Closed form, and on a stream of which one pool gets three quarters: the load inside each pool evens out."""
    counts, pool = torch.tensor([6, 2, 1, 0, 2]), torch.tensor([0, 0, 1, 1, 1])
    assert violation(counts, pool).tolist() == [2, -2, 0, -1, 1]
    assert violation(counts).tolist() == [c - 2.2 for c in counts.tolist()]
    torch.manual_seed(0)
    own = torch.tensor([0] * 6 + [1] * 6)
    moe = MoE(8, 12, 2, 4, 0, pool=own).train()
    optimizer = torch.optim.AdamW(parameter_groups(moe, rate=1e-9, speed=2e-2))
    total = torch.zeros(12)
    for step in range(300):
        which = (torch.rand(256) < 0.25).long()
        x = torch.randn(256, 8) + 1.0
        y, routed = moe(x, allowed=own[None] == which[:, None])
        (y.sum() * 0.0).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step >= 250:
            total += loads(routed, 12)
    assert float(max_violation(total[:6])) < 0.2  # 1.5 and more without balance
    assert float(max_violation(total[6:])) < 0.2
    assert float(moe.bias.mean().abs()) < 1.0
