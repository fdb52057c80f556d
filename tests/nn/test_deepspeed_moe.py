"""Our mixture of experts against DeepSpeed's layer with the same weights."""

from __future__ import annotations

import pytest
import torch

from raysys.nn.moe import MoE


@pytest.fixture
def peer_class(monkeypatch: pytest.MonkeyPatch) -> type:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    pytest.importorskip("deepspeed")
    from raysys.nn.deepspeed_moe import DeepSpeedMoE

    return DeepSpeedMoE


@pytest.mark.parametrize(("experts", "active"), [(8, 2), (16, 4), (5, 5)])
def test_outputs_gradients_and_choices_equal_deepspeed(peer_class: type, experts: int, active: int) -> None:
    torch.manual_seed(experts)
    ours = MoE(24, experts, active, 12, 0, score="softmax", balanced=False)
    peer = peer_class.of(ours)
    x = torch.randn(70, 24, requires_grad=True)
    up = torch.randn(70, 24)
    (y, routed), (z, theirs) = ours(x), peer(x)
    assert float((y - z).abs().max()) < 1e-5
    assert torch.equal(routed.experts, theirs.experts)
    assert torch.allclose(routed.gates, theirs.gates, atol=1e-6)
    (mine,) = torch.autograd.grad(y, x, up, retain_graph=True)
    (other,) = torch.autograd.grad(z, x, up, retain_graph=True)
    assert float((mine - other).abs().max()) < 1e-5
    y.backward(up)
    z.backward(up)
    assert ours.router.grad is not None
    assert float((ours.router.grad - peer._gate.grad).abs().max()) < 1e-5
    for e, expert in enumerate(peer._experts):
        assert torch.allclose(ours.w_in.grad[e], expert.w_in.weight.grad.T, atol=1e-5)
        assert torch.allclose(ours.w_out.grad[e], expert.w_out.weight.grad.T, atol=1e-5)


def test_weights_come_back_as_they_went(peer_class: type) -> None:
    ours = MoE(8, 4, 2, 6, 0, score="softmax", balanced=False)
    back = peer_class.of(ours).to_moe()
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), back.state_dict().values(), strict=True))


def test_what_deepspeed_cannot_do_is_refused(peer_class: type) -> None:
    with pytest.raises(ValueError, match="softmax scores, no shared expert"):
        peer_class.of(MoE(8, 4, 2, 6, 0))
    with pytest.raises(ValueError, match="softmax scores, no shared expert"):
        peer_class.of(MoE(8, 4, 2, 6, 3, score="softmax"))
    with pytest.raises(ValueError, match="from 2 active experts on, got 1"):
        peer_class(8, 4, 1, 6)
