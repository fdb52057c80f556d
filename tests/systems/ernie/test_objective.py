"""Objectives against their closed forms (spec 5.4), and their gradients against the softmax bandit's."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from raysys.systems.ernie.rl import objective as o
from raysys.systems.ernie.rl.setting import ObjectiveSetting


def drawn(seed, answers=6, longest=5, gap=0.3, length=None):
    """Log-probabilities of three policies, a mask of ragged answers, and advantages of two groups."""
    g = torch.Generator().manual_seed(seed)
    old = torch.randn(answers, longest, generator=g).double().sub(2)
    new = (old + gap * torch.randn(answers, longest, generator=g)).requires_grad_()
    infer = old + gap * torch.randn(answers, longest, generator=g)
    lengths = (
        torch.randint(1, longest + 1, (answers,), generator=g) if length is None else torch.full((answers,), length)
    )
    mask = torch.arange(longest) < lengths[:, None]
    advantage = o.group_advantages(torch.rand(answers, generator=g).double(), answers // 2)
    return new, old, infer, mask, advantage


def gradient(value, of):
    return torch.autograd.grad(value, of, retain_graph=True)[0]


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_gspo_of_answers_of_one_token_is_grpo(seed):
    new, old, _, mask, advantage = drawn(seed, length=1)
    bounds = {"low": 0.1, "high": 0.2}
    one, other = o.gspo(new, old, mask, advantage, **bounds), o.grpo(new, old, mask, advantage, **bounds)
    torch.testing.assert_close(one, other)
    torch.testing.assert_close(gradient(one, new), gradient(other, new))


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_at_the_old_weights_the_ratio_is_1_and_the_gradient_is_reinforce_with_the_groups_baseline(seed):
    new, _, _, mask, advantage = drawn(seed)
    old = new.detach()
    assert torch.equal(o.sequence_ratio(new, old, mask), torch.ones(6).double())
    reinforce = -o.averaged(new * advantage[:, None], mask)
    for surrogate in (o.grpo, o.gspo):
        torch.testing.assert_close(gradient(surrogate(new, old, mask, advantage), new), gradient(reinforce, new))


def test_the_token_form_of_gspo_has_the_value_and_gradient_of_the_sequence_form():
    new, old, _, mask, advantage = drawn(3)
    s = o.sequence_ratio(new, old, mask)
    sequence = -torch.minimum(s * advantage, s.clamp(0.9, 1.1) * advantage).mean()
    token = o.gspo(new, old, mask, advantage, low=0.1, high=0.1)
    torch.testing.assert_close(token, sequence)
    torch.testing.assert_close(gradient(token, new), gradient(sequence, new))


@given(st.integers(0, 10_000), st.sampled_from(["token", "sequence"]))
@settings(max_examples=25, deadline=None)
def test_equal_engines_make_icepop_and_misc_the_unmasked_objective(seed, level):
    new, old, _, mask, advantage = drawn(seed)
    weight = o.icepop(old, old.clone(), mask, 0.2, 5.0, level)
    assert torch.equal(weight, torch.ones_like(old))
    for surrogate in (o.grpo, o.gspo):  # IcePop eqs. 1 and 2, MISC eq. 3
        assert torch.equal(surrogate(new, old, mask, advantage, weight=weight), surrogate(new, old, mask, advantage))
    assert o.train_infer_kl(old, old.clone(), mask) == 0


def test_bounds_of_zero_and_infinity_are_plain_importance_sampling():
    new, old, infer, mask, advantage = drawn(5)
    weight = o.icepop(old, infer, mask, 0.0, float("inf"))
    value = o.grpo(new, old, mask, advantage, low=float("inf"), high=float("inf"), weight=weight)
    plain = -o.averaged((new - infer).exp() * advantage[:, None], mask)
    torch.testing.assert_close(value, plain)
    torch.testing.assert_close(gradient(value, new), gradient(plain, new))


def test_icepop_drops_what_lies_outside_its_bounds_and_tis_caps_it():
    old = torch.tensor([[0.0, 0.0, 0.0, 0.0]])
    infer = -torch.tensor([[0.1, 1.0, 1.7, 9.0]]).log()
    mask = torch.tensor([[True, True, True, False]])
    rho = torch.tensor([[0.1, 1.0, 1.7, 1.0]])  # padding has ratio 1, and no weight in any mean
    torch.testing.assert_close(o.icepop(old, infer, mask, 0.2, 1.6), rho * torch.tensor([[0.0, 1, 0, 1]]))
    torch.testing.assert_close(o.truncated(old, infer, mask, 1.5), rho.clamp_max(1.5))
    geometric = (0.1 * 1.7) ** (1 / 3)
    torch.testing.assert_close(o.icepop(old, infer, mask, 0.2, 5.0, "sequence"), torch.full((1, 4), geometric))
    assert (o.icepop(old, infer, mask, 0.6, 5.0, "sequence") == 0).all()  # eq. 2 prunes the whole answer


def test_misc_masks_gradients_token_by_token_with_the_sequences_ratio():
    new, old, infer, mask, advantage = drawn(8, gap=0.6)
    weight = o.icepop(old, infer, mask, 0.7, 1.4)
    found = gradient(o.gspo(new, old, mask, advantage, low=9, high=9, weight=weight), new)
    s = o.sequence_ratio(new, old, mask).detach()
    length = mask.sum(1)
    expected = -(weight * (s * advantage / length)[:, None] * mask) / len(s)
    torch.testing.assert_close(found, expected)
    assert ((weight == 0) & mask).any()


def test_equal_rewards_give_no_gradient_and_others_are_normalised():
    rewards = torch.tensor([1.0, 1, 1, 0, 0, 0, 1, 0, 0])
    advantage = o.group_advantages(rewards, 3)
    assert torch.equal(advantage[:6], torch.zeros(6))
    assert advantage[6:].sum().abs() < 1e-6
    assert advantage[6:].square().mean() == pytest.approx(1)
    torch.testing.assert_close(o.group_advantages(rewards, 3, scale=False)[6:], torch.tensor([2 / 3, -1 / 3, -1 / 3]))
    assert o.informative(rewards, 3).tolist() == [False] * 6 + [True] * 3
    assert torch.equal(o.group_advantages(torch.full((4,), 0.1), 4), torch.zeros(4))  # .1 is not exact in binary
    new, old, _, mask, _ = drawn(1)
    zero = torch.zeros(6).double()
    for surrogate in (o.grpo, o.gspo):
        assert torch.equal(gradient(surrogate(new, old, mask, zero), new), torch.zeros_like(old))


@given(st.lists(st.floats(-5, 5, width=32), min_size=4, max_size=4), st.floats(0.125, 8, width=32))
@settings(max_examples=30, deadline=None)
def test_advantages_do_not_depend_on_the_scale_and_origin_of_rewards(values, scale):
    rewards = torch.tensor(values).double()
    if rewards.max() - rewards.min() < 1e-3:
        return
    torch.testing.assert_close(
        o.group_advantages(rewards * scale + 3, 4), o.group_advantages(rewards, 4), atol=1e-6, rtol=1e-6
    )


def test_wpsm_softens_certain_answers_of_mastered_queries_only():
    entropy = torch.tensor([[0.1, 0.1], [0.1, 0.1], [0.9, 0.9], [0.1, 0.1]])
    mask = torch.ones(4, 2, dtype=torch.bool)
    rate, advantage = torch.tensor([0.9, 0.5, 0.9, 0.9]), torch.tensor([1.0, 1, 1, -1])
    found = o.mastered(entropy, mask, rate, advantage, 0.8, 0.5, 0.7)
    torch.testing.assert_close(found, torch.tensor([0.2, 1, 1, 1]))
    as_printed = o.mastered(entropy, mask, rate, advantage, 0.8, 0.5, 0.7, only_positive=False)
    torch.testing.assert_close(as_printed, torch.tensor([0.2, 1, 1, 0.2]))


def judged(seed):
    new, old, infer, mask, advantage = drawn(seed)
    entropy = torch.full_like(old, 0.01, requires_grad=True)
    return o.Judged(new, old, infer, mask, advantage, entropy, torch.full((6,), 0.9).double())


def test_the_setting_chooses_each_published_objective():
    batch = judged(11)
    new, old, infer, mask, advantage, *_ = batch
    icepop = o.icepop(old, infer, mask, 0.2, 5.0)
    whole = o.icepop(old, infer, mask, 0.2, 5.0, "sequence")
    bounds = {"low": 0.05, "high": 0.05}
    cases = {
        "GSPO = WPSM with alpha 0": (
            {"correction": "off", "wpsm_alpha": 0.0},
            o.gspo(new, old, mask, advantage, **bounds),
        ),
        "MISC": ({}, o.gspo(new, old, mask, advantage, weight=icepop, **bounds)),
        "GSPO + IcePop": ({"level": "sequence"}, o.gspo(new, old, mask, advantage, weight=whole, **bounds)),
        "GRPO + IcePop": ({"ratio": "token"}, o.grpo(new, old, mask, advantage, weight=icepop, **bounds)),
        "DAPO": (
            {"ratio": "token", "correction": "off", "clip_low": 0.2, "clip_high": 0.28, "average": "token"},
            o.grpo(new, old, mask, advantage, low=0.2, high=0.28, average="token"),
        ),
        "TIS": (
            {"correction": "tis", "upper": 1.2, "ratio": "token"},
            o.grpo(new, old, mask, advantage, weight=o.truncated(old, infer, mask, 1.2), **bounds),
        ),
    }
    for name, (values, expected) in cases.items():
        value, metrics = o.loss(ObjectiveSetting.of(values), batch)
        assert torch.equal(value, expected), name
        assert 0 <= metrics["masked"] <= 1
        assert 0 <= metrics["clipped"] <= 1
        assert metrics["entropy"] == pytest.approx(0.01)
    softened, metrics = o.loss(ObjectiveSetting.of({"wpsm_alpha": 1.0, "wpsm_only_positive": False}), batch)
    assert softened == 0
    assert metrics["softened"] == 1


def test_padding_changes_nothing_whatever_it_holds():
    new, old, infer, mask, advantage = drawn(2)
    spoilt = [torch.where(mask, x.detach(), -torch.inf) for x in (new, old, infer)]
    for x in spoilt:
        x.requires_grad_()
    weight = o.icepop(old, infer, mask, 0.5, 2.0)
    value = o.gspo(spoilt[0], spoilt[1], mask, advantage, weight=o.icepop(spoilt[1], spoilt[2], mask, 0.5, 2.0))
    torch.testing.assert_close(value, o.gspo(new, old, mask, advantage, weight=weight))
    assert gradient(value, spoilt[0]).isfinite().all()


def test_the_kl_of_the_engines_is_the_exact_one_in_expectation():
    p, q = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.2, 0.3]], dtype=torch.float64)
    exact = float((p * (p / q).log()).sum())  # KL(train || infer), tokens drawn from infer = q
    one = torch.tensor([[True]])
    told = [o.train_infer_kl(p.log()[None, [i]], q.log()[None, [i]], one) for i in range(3)]
    values = torch.tensor(told, dtype=torch.float64)
    assert float((q * values).sum()) == pytest.approx(exact, abs=1e-12)
    assert (values >= 0).all()


def test_the_mean_gradient_of_the_softmax_bandit_is_the_exact_policy_gradient():
    """One token, exact expectation over all pairs of actions: E[grad] = pi (R - pi R) times the group's (G - 1) / G."""
    logits = torch.tensor([0.3, -0.2, 0.5]).double().requires_grad_()
    rewards = torch.tensor([1.0, 0.0, 0.4]).double()
    p = logits.softmax(0)
    mask = torch.ones(2, 1, dtype=torch.bool)
    total = torch.zeros(3).double()
    for i in range(3):
        for j in range(3):
            chosen = torch.tensor([i, j])
            new = p.log()[chosen][:, None]
            advantage = o.group_advantages(rewards[chosen], 2, scale=False)
            value = o.grpo(new, new.detach(), mask, advantage)
            total += float((p[i] * p[j]).detach()) * gradient(value, logits)
    exact = gradient((p * rewards).sum(), logits)
    torch.testing.assert_close(-total, exact * 0.5)


def test_importance_weights_correct_a_mismatched_engine_and_ignoring_it_does_not():
    """Tokens drawn from q: with rho = p / q the expected gradient is the on-policy one; without, it is not."""
    logits = torch.tensor([0.3, -0.2, 0.5]).double().requires_grad_()
    q = torch.tensor([0.6, 0.3, 0.1]).double()
    advantage = torch.tensor([1.0, -0.5, 0.3]).double()
    p = logits.softmax(0)
    mask = torch.ones(1, 1, dtype=torch.bool)
    found = {}
    for name in ("rho", "ignored"):
        total = torch.zeros(3).double()
        for i in range(3):
            new = p.log()[None, [i]]
            weight = o.icepop(new, q.log()[None, [i]], mask, 0, 1e9) if name == "rho" else None
            total += float(q[i]) * gradient(o.grpo(new, new.detach(), mask, advantage[[i]], weight=weight), logits)
        found[name] = -total
    exact = gradient((p * advantage).sum(), logits)
    torch.testing.assert_close(found["rho"], exact)
    assert (found["ignored"] - exact).abs().max() > 0.05
