"""DeepSpeed's own mixture-of-experts layer behind the interface of `moe.MoE`: the reference that ours is held against.

Notable choices
- It takes what both can do: softmax scores, k >= 2 with gates renormalised, no shared expert, no balancing bias, no capacity.
  (With k = 1 DeepSpeed weighs by the probability itself, with k = 2 it samples the second expert unless told not to.)
- Weights are copied in both directions; DeepSpeed keeps an nn.Module per expert.

DeepSpeed is an extra, and reads DS_ACCELERATOR when it is imported: set it to "cpu" where torch was built for CUDA but none
is there.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from raysys.nn.moe import MoE, Routed, SwiGLU


class DeepSpeedMoE(nn.Module):
    """deepspeed.moe.layer.MoE of SwiGLU experts, on one process; arguments as those of `moe.MoE`."""

    def __init__(self, width: int, experts: int, active: int, expert_width: int) -> None:
        super().__init__()
        if active < 2:
            raise ValueError(f"DeepSpeed renormalises gates from 2 active experts on, got {active}")
        from deepspeed.moe.layer import MoE as Peer

        self.experts, self.active, self.expert_width = experts, active, expert_width
        self.layer = Peer(
            width, SwiGLU(width, expert_width), experts, k=active, drop_tokens=False, top2_2nd_expert_sampling=False
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Routed]:
        """(N, D) -> (N, D), and what was chosen."""
        y: Tensor = self.layer(x)[0]
        logits = x.float() @ self._gate.float().T
        scores = logits.softmax(-1)
        gates, chosen = scores.topk(self.active, dim=-1)
        return y, Routed(chosen, gates / gates.sum(-1, keepdim=True), scores, logits, None)

    @classmethod
    def of(cls, moe: MoE) -> Self:
        """The same layer in DeepSpeed.

        Raises:
            ValueError: it has sigmoid scores, a shared expert, a bias that is not 0, or a single active expert.
        """
        if moe.score != "softmax" or moe.shared is not None or moe.bias.any():
            raise ValueError("DeepSpeed's layer has softmax scores, no shared expert and no balancing bias")
        peer = cls(moe.router.shape[1], moe.experts, moe.active, moe.w_out.shape[1]).to(moe.router.device)
        with torch.no_grad():
            peer._gate.copy_(moe.router)
            for e, expert in enumerate(peer._experts):
                expert.w_in.weight.copy_(moe.w_in[e].T)
                expert.w_out.weight.copy_(moe.w_out[e].T)
        return peer

    def to_moe(self) -> MoE:
        """The same layer in ours."""
        moe = MoE(self._gate.shape[1], self.experts, self.active, self.expert_width, 0, score="softmax", balanced=False)
        with torch.no_grad():
            moe.router.copy_(self._gate)
            for e, expert in enumerate(self._experts):
                moe.w_in[e] = expert.w_in.weight.T
                moe.w_out[e] = expert.w_out.weight.T
        return moe.to(self._gate.device)

    @property
    def _gate(self) -> Tensor:
        gate: Tensor = self.layer.deepspeed_moe.gate.wg.weight
        return gate

    @property
    def _experts(self) -> list[SwiGLU]:
        return list(self.layer.deepspeed_moe.experts.deepspeed_experts)
