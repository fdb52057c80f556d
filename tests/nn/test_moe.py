"""The mixture of experts against the layers that it must equal in special cases, and against its definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from raysys.nn import experts
from raysys.nn.moe import MoE

WIDTH, INNER = 16, 6


def layer(number: int = 8, active: int = 3, shared: int = 10, **options: Any) -> MoE:
    torch.manual_seed(number + active)
    moe = MoE(WIDTH, number, active, INNER, shared, **options)
    torch.nn.init.normal_(moe.bias, std=0.05)
    return moe


def tokens(n: int = 40, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(seed)).to(dtype)


def expert(moe: MoE, e: int, x: Tensor) -> Tensor:
    gate, up = (x @ moe.w_in[e]).chunk(2, dim=-1)
    return (F.silu(gate) * up) @ moe.w_out[e]


def reference(moe: MoE, x: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
    """The definition, one token and one expert at a time."""
    rows = []
    for n in range(len(x)):
        y = moe.shared(x[n]) if moe.shared is not None else 0 * x[n]
        for e, gate in zip(chosen[n].tolist(), gates[n], strict=True):
            y = y + gate * expert(moe, e, x[n]) if e >= 0 else y
        rows.append(y)
    return torch.stack(rows)


def apart(a: Tensor, b: Tensor) -> float:
    return float((a.detach().double() - b.detach().double()).abs().max())


@given(
    n=st.integers(1, 12),
    number=st.integers(1, 7),
    data=st.data(),
    score=st.sampled_from(["sigmoid", "softmax"]),
    shared=st.sampled_from([0, 5]),
)
@settings(max_examples=40, deadline=None)
def test_any_routing_is_the_definition_with_its_gradients(
    n: int, number: int, data: Any, score: str, shared: int
) -> None:
    active = data.draw(st.integers(1, number))
    moe = layer(number, active, shared, score=score).double()
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    allowed = torch.rand(n, number, generator=draw) < 0.7
    ranks = torch.randint(1, active + 1, (n,), generator=draw)
    x = tokens(n, dtype=torch.float64).requires_grad_()
    y, routed = moe(x, active=ranks, allowed=allowed)
    expected = reference(moe, x, routed.experts, routed.gates)
    assert apart(y, expected) < 1e-12
    given = [x, *(p for p in moe.parameters() if p is not moe.bias)]
    up = torch.randn(n, WIDTH, generator=draw, dtype=torch.float64)
    mine, theirs = (
        torch.autograd.grad(out, given, up, retain_graph=True, materialize_grads=True) for out in (y, expected)
    )
    assert max(apart(a, b) for a, b in zip(mine, theirs, strict=True)) < 1e-12
    used = routed.experts >= 0
    assert torch.equal(used.sum(1), torch.minimum(ranks, allowed.sum(1)))
    assert torch.equal(routed.gates != 0, used)
    assert allowed.gather(1, routed.experts.clamp(min=0))[used].all()


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_all_experts_active_is_the_dense_soft_mixture(score: str) -> None:
    moe, x = layer(6, 6, 0, score=score), tokens()
    s = torch.sigmoid(x @ moe.router.T) if score == "sigmoid" else (x @ moe.router.T).softmax(-1)
    dense = torch.stack([expert(moe, e, x) for e in range(6)], dim=1)
    assert apart(moe(x)[0], ((s / s.sum(-1, keepdim=True))[..., None] * dense).sum(1)) < 1e-6


def test_one_expert_is_an_mlp() -> None:
    moe, x = layer(1, 1, 0), tokens()
    assert apart(moe(x)[0], expert(moe, 0, x)) < 1e-6


def test_experts_that_are_all_alike_are_one_dense_expert() -> None:
    moe, x = layer(8, 3, 0), tokens()
    with torch.no_grad():
        moe.w_in.copy_(moe.w_in[:1].expand_as(moe.w_in))
        moe.w_out.copy_(moe.w_out[:1].expand_as(moe.w_out))
    assert apart(moe(x)[0], expert(moe, 0, x)) < 1e-6


def test_the_order_of_experts_does_not_matter() -> None:
    moe, other, x = layer(), layer(), tokens()
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for name in ("router", "bias", "w_in", "w_out"):
            getattr(other, name).copy_(getattr(moe, name)[order])
    (y, routed), (z, theirs) = moe(x), other(x)
    assert apart(y, z) < 1e-6
    assert torch.equal(order[theirs.experts], routed.experts)


@given(n=st.integers(0, 20), number=st.integers(1, 9), k=st.integers(1, 4), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_dispatch_and_combine_with_unit_gates_are_the_identity(n: int, number: int, k: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    chosen = torch.randint(-1, number, (n, k), generator=draw)
    plan = experts.dispatch(chosen, number)
    assert torch.equal(plan.counts, torch.bincount(chosen[chosen >= 0], minlength=number))  # dropless: all of them
    assert torch.equal(chosen.reshape(-1)[plan.order], torch.repeat_interleave(torch.arange(number), plan.counts))
    x = tokens(n)
    used = (chosen >= 0).sum(1)
    # All experts are one: what the layer dispatches and combines is that expert's output, once for each use.
    moe = layer(1, 1, 0)
    shared = [w.detach().repeat(number, 1, 1) for w in (moe.w_in, moe.w_out)]
    for path in ("loop", None):
        y = experts.mixture(x, *shared, chosen, torch.ones(n, k), path)
        assert apart(y, expert(moe, 0, x) * used[:, None]) < 1e-5 if n else y.shape == x.shape


def test_grouped_products_of_no_token_have_gradients() -> None:
    """The kernel refuses them, and a worker may get none."""
    moe, x = layer(), tokens(0).requires_grad_()
    chosen, gates = torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, 3, requires_grad=True)
    y = experts.mixture(x, moe.w_in, moe.w_out, chosen, gates, "grouped")
    assert y.shape == x.shape
    y.sum().backward()
    assert not moe.w_in.grad.any()
    assert moe.w_out.grad.shape == moe.w_out.shape


def test_every_token_reaches_each_of_its_experts() -> None:
    """Even if all tokens choose the same expert: there is no capacity."""
    moe, x = layer(8, 1, 0), tokens(100)
    moe.bias.data = torch.tensor([0.0, 0, 9, 0, 0, 0, 0, 0])
    y, routed = moe(x)
    assert experts.dispatch(routed.experts, 8).counts.tolist() == [0, 0, 100, 0, 0, 0, 0, 0]
    assert apart(y, expert(moe, 2, x)) < 1e-6


@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_smaller_active_equals_the_layer_with_a_smaller_k(k: int) -> None:
    moe, small, x = layer(8, 4), layer(8, k), tokens()
    small.load_state_dict(moe.state_dict())
    y, routed = moe(x, active=torch.full((len(x),), k))
    z, theirs = small(x)
    assert torch.equal(y, z)
    assert torch.equal(routed.experts[:, :k], theirs.experts)
    assert (routed.experts[:, k:] == -1).all()


def test_allowed_experts_equal_the_layer_of_these_experts() -> None:
    moe, small, x = layer(), layer(4), tokens()
    keep = torch.tensor([0, 3, 4, 7])
    state = {n: v[keep] if n in ("router", "bias", "w_in", "w_out") else v for n, v in moe.state_dict().items()}
    small.load_state_dict(state)
    allowed = torch.zeros(len(x), 8, dtype=torch.bool)
    allowed[:, keep] = True
    assert apart(moe(x, allowed=allowed)[0], small(x)[0]) < 1e-6


def test_gates_sum_to_one_and_the_bias_is_not_in_them() -> None:
    moe, x = layer(), tokens()
    _, routed = moe(x)
    assert torch.allclose(routed.gates.sum(1), torch.ones(len(x)))
    s = routed.scores.gather(1, routed.experts)
    assert torch.allclose(routed.gates, s / s.sum(1, keepdim=True))
    assert torch.equal(routed.experts, (routed.scores + moe.bias).topk(3).indices)


def test_replay_repeats_a_choice_and_lets_gradients_reach_the_router() -> None:
    moe, x = layer(), tokens()
    y, routed = moe(x, active=torch.randint(1, 4, (len(x),), generator=torch.Generator().manual_seed(2)))
    moe.bias.data.normal_()  # would choose otherwise
    z, again = moe(x, replay=routed.experts)
    assert torch.equal(y, z)
    assert torch.equal(again.experts, routed.experts)
    z.square().sum().backward()  # type: ignore[no-untyped-call]
    assert moe.router.grad is not None
    assert float(moe.router.grad.abs().max()) > 1e-3


def test_no_tokens_are_no_trouble() -> None:
    moe = layer()
    x = tokens(0).requires_grad_()
    y, routed = moe(x, active=torch.ones(0, dtype=torch.int64), allowed=torch.ones(0, 8, dtype=torch.bool))
    (y.sum() + routed.logits.sum()).backward()
    assert y.shape == (0, WIDTH)
    assert moe.bias.grad is not None
    assert not moe.bias.grad.any()
    assert moe.w_in.grad is not None
    assert not moe.w_in.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("active", [1, 4])
def test_both_ways_to_compute_the_experts_agree(dtype: torch.dtype, active: int) -> None:
    draw = torch.Generator().manual_seed(active)
    x, w_in, w_out = (
        (torch.randn(*shape, generator=draw) / shape[-2] ** 0.5).to(dtype).requires_grad_()
        for shape in ((900, 32), (9, 32, 32), (9, 16, 32))
    )
    chosen = torch.rand(900, 8, generator=draw).topk(active).indices  # the last expert gets nothing
    chosen[torch.rand(900, active, generator=draw) < 0.3] = -1
    gates = torch.rand(900, active, generator=draw).requires_grad_()
    assert experts.grouped_works(torch.device("cpu"), dtype)
    both = []
    for path in ("loop", "grouped"):
        y = experts.mixture(x, w_in, w_out, chosen, gates, path)  # type: ignore[arg-type]
        both.append((y, *torch.autograd.grad(y.float().square().sum(), (x, w_in, w_out, gates))))
    assert both[0][0].dtype == dtype
    for a, b in zip(*both, strict=True):
        assert apart(a, b) <= (1e-5 if dtype == torch.float32 else 2e-2) * max(1.0, float(b.abs().max()))


def test_the_gradient_is_that_of_finite_differences() -> None:
    moe = layer(4, 2, 3).double().eval()
    x = tokens(5, dtype=torch.float64).requires_grad_()
    replay = moe.route(x).experts.detach()
    names = [name for name, p in moe.named_parameters() if name != "bias"]

    def f(x: Tensor, *values: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(moe, dict(zip(names, values, strict=True)), (x,), {"replay": replay})[
            0
        ]
        return out

    assert torch.autograd.gradcheck(f, (x, *(moe.get_parameter(name) for name in names)))


def test_float64_stays_float64_and_autocast_leaves_the_router_alone() -> None:
    moe, x = layer(), tokens()
    y, routed = moe(x)
    with torch.autocast("cpu", torch.bfloat16):
        z, rounded = moe(x)
    assert torch.equal(routed.experts, rounded.experts)
    assert torch.equal(routed.gates, rounded.gates)
    assert rounded.logits.dtype == torch.float32
    assert 1e-5 < apart(y, z) < 0.02  # 0.003: products of experts were in bfloat16
    narrow, wide = moe.to(torch.bfloat16)(x.to(torch.bfloat16)), moe.double()(x.double())
    assert narrow[0].dtype == torch.bfloat16
    assert narrow[1].gates.dtype == torch.float32
    assert wide[0].dtype == wide[1].gates.dtype == torch.float64


def allocated(number: int) -> int:
    """Bytes that a backward pass allocates, freed or not, for 64 tokens and `number` experts."""
    moe = MoE(32, number, 2, 16, 0)
    loss = moe(torch.randn(64, 32))[0].sum()
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        loss.backward()
    return sum(max(0, event.self_cpu_memory_usage) for event in seen.events())


def test_backward_is_linear_in_the_number_of_experts() -> None:
    few, many = allocated(64), allocated(512)  # 0.52 and 3.6 MB
    assert few > 64 * 3 * 32 * 16 * 4  # the gradients themselves were seen
    assert many < 9 * few  # `w[e]` in a loop would make it 64 times as much


def test_ultra_sparse_with_256_experts() -> None:
    """1.6 % of the routed parameters per token, most experts with few tokens or none."""
    torch.manual_seed(0)
    moe, x = MoE(WIDTH, 256, 4, INNER, 10), tokens(50)
    y, routed = moe(x)
    assert apart(y, reference(moe, x, routed.experts, routed.gates)) < 1e-5
    y.sum().backward()
    assert moe.w_in.grad is not None
    idle = torch.bincount(routed.experts.reshape(-1), minlength=256) == 0
    assert 0 < int(idle.sum()) < 256
    assert torch.equal(moe.w_in.grad.abs().amax((1, 2)) == 0, idle)


def test_more_active_experts_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="a mixture of 4 experts takes 1 to 4 active ones, got 5"):
        MoE(WIDTH, 4, 5, INNER, 0)
