"""A mixture-of-experts layer: routed fine-grained experts and a shared one, for any pattern of elastic routing.

Shapes: N tokens of D numbers (no padding among them), E experts, at most k of them active for a token.

Notable choices (DeepSeek-V3's form of the layer; ERNIE 5.0, section 2.2, says what and not how, so INFERRED)
- The bias is used to select, never in the gates, which are scores renormalised over the chosen experts.
- One argument per question: `active` (how many of a token's experts), `allowed` (which), `counted` (does it count for the
  balance), `replay` (the choice was made elsewhere). Elastic width and sparsity, experts kept apart by modality, and the
  routing of a rollout repeated in training (R3, arXiv 2510.11370) are values of them, not modes.
- The balance is a gradient: in training, `bias` gets (c_e - mean c) 2^-40 whatever the loss says, c_e being the counted
  assignments of this call. Whatever averages gradients over workers and micro-batches thereby makes counts global, no
  buffer changes in `forward`, the size leaves a clipped norm alone, and activation checkpointing does not count twice.
  An AdamW group with betas (0, 0) turns it into b -= u sign(c - mean c): see `balance.parameter_groups`.
- Router logits, scores and gates are float32 under autocast.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raysys.nn import experts
from raysys.nn.expert_parallel import ExpertParallel

SCALE = 2.0**-40
"""Of the balance's gradient: far below every other gradient, far above float32's smallest number, even squared."""


class Routed(NamedTuple):
    """What the router chose for N tokens."""

    experts: Tensor
    """(N, k) int64, best first; -1 where unused."""
    gates: Tensor
    """(N, k) float32: a token's sum to 1; 0 where unused."""
    scores: Tensor
    """(N, E) float32, before bias and mask."""
    logits: Tensor
    """(N, E) float32."""
    counted: Tensor | None
    """(N,) bool: tokens that count for the balance; None for all."""


class SwiGLU(nn.Module):
    """x -> (silu(x W_gate) * (x W_up)) W_out, without biases (Shazeer 2020)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.w_in, self.w_out = nn.Linear(width, 2 * inner, bias=False), nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w_in(x).chunk(2, dim=-1)
        y: Tensor = self.w_out(F.silu(gate) * up)
        return y


class MoE(nn.Module):
    """y = Shared(x) + sum over the chosen experts of gate * Expert(x).

    Args:
        width: D.
        experts: E.
        active: k, the most experts of a token.
        expert_width: inner width of a routed expert.
        shared_width: inner width of the shared expert; 0 for none.
        score: sigmoid (DeepSeek-V3) or softmax (ERNIE 4.5) of the logits.
        balanced: whether the selection bias is trained to balance the load; it stays 0 otherwise.
        pool: (E,) int64, where experts are kept apart: which pool each is of. The load is balanced within each pool.
    """

    def __init__(
        self,
        width: int,
        experts: int,
        active: int,
        expert_width: int,
        shared_width: int,
        *,
        score: Literal["sigmoid", "softmax"] = "sigmoid",
        balanced: bool = True,
        pool: Tensor | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= active <= experts:
            raise ValueError(f"a mixture of {experts} experts takes 1 to {experts} active ones, got {active}")
        self.experts, self.active, self.score = experts, active, score
        self.router = nn.Parameter(torch.empty(experts, width))
        self.bias: Tensor
        if balanced:
            self.bias = nn.Parameter(torch.zeros(experts))
        else:
            self.register_buffer("bias", torch.zeros(experts))
        self.pool: Tensor | None
        self.register_buffer("pool", pool, persistent=False)
        self.w_in = nn.Parameter(torch.empty(experts, width, 2 * expert_width))
        self.w_out = nn.Parameter(torch.empty(experts, expert_width, width))
        self.shared = SwiGLU(width, shared_width) if shared_width else None
        self.parallel: ExpertParallel | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform in +-1/sqrt(fan_in), as nn.Linear starts; the bias is 0."""
        for weight, fan_in in ((self.router, -1), (self.w_in, -2), (self.w_out, -2)):
            bound = weight.shape[fan_in] ** -0.5
            nn.init.uniform_(weight, -bound, bound)
        nn.init.zeros_(self.bias)

    def forward(
        self,
        x: Tensor,
        *,
        active: Tensor | None = None,
        allowed: Tensor | None = None,
        counted: Tensor | None = None,
        replay: Tensor | None = None,
    ) -> tuple[Tensor, Routed]:
        """
        Args:
            x: (N, D); N may be 0.
            active: (N,) int64 in 1..k, experts of each token; k for all by default.
            allowed: (N, E) bool, experts that each token may use; all by default. Fewer than `active` are all used.
            counted: (N,) bool, tokens that count for the balance; all by default.
            replay: (N, k) int64, the choice to repeat instead of the best scores, -1 where unused; `active` and `allowed`
                still apply. The gates are of the scores of now, so gradients reach the router.

        Returns:
            (N, D) in x's dtype, and what was chosen.
        """
        routed = self.route(x, active=active, allowed=allowed, counted=counted, replay=replay)
        y = self.routed(x, routed.experts, routed.gates)
        if self.shared is not None:
            y = y + self.shared(x).to(y.dtype)
        if self.training and self.bias.requires_grad and torch.is_grad_enabled():
            y = _Balance.apply(y, self.bias, violation(loads(routed, self.experts), self.pool))  # type: ignore[no-untyped-call]
        return y, routed

    def route(
        self,
        x: Tensor,
        *,
        active: Tensor | None = None,
        allowed: Tensor | None = None,
        counted: Tensor | None = None,
        replay: Tensor | None = None,
    ) -> Routed:
        """The choice alone; arguments as in `forward`."""
        with torch.autocast(x.device.type, enabled=False):
            wide = torch.promote_types(x.dtype, torch.float32)
            logits = x.to(wide) @ self.router.to(wide).T
            scores = logits.sigmoid() if self.score == "sigmoid" else logits.softmax(-1)
            if replay is None:
                selection = scores.detach() + self.bias.detach()
                if allowed is not None:
                    selection = selection.masked_fill(~allowed, -torch.inf)
                chosen = selection.topk(self.active, dim=-1).indices
            else:
                chosen = replay
            if replay is None and active is None and allowed is None:  # all are used
                gates = scores.gather(1, chosen)
                gates = gates / gates.sum(-1, keepdim=True).clamp(min=1e-12)
                return Routed(chosen, gates, scores, logits, counted)
            used = chosen >= 0
            index = chosen.clamp(min=0)
            if allowed is not None:
                used = used & allowed.gather(1, index)
            if active is not None:
                used = used & (torch.arange(self.active, device=x.device) < active[:, None])
            gates = scores.gather(1, index) * used
            gates = gates / gates.sum(-1, keepdim=True).clamp(min=1e-12)
            return Routed(chosen.masked_fill(~used, -1), gates, scores, logits, counted)

    def routed(self, x: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
        """The routed experts' part of the output, (N, D), for a choice (N, k) and its gates (N, k)."""
        mixture = experts.mixture if self.parallel is None else self.parallel.mixture
        return mixture(x, self.w_in, self.w_out, chosen, gates)

    def shard(self, rank: int, size: int, group: Any) -> list[nn.Parameter]:
        """Keep this process's share of the experts; from now on all `size` processes of the group compute together.

        Returns:
            The parameters that were cut along their first dimension; they are the same objects.

        Raises:
            ValueError: the experts cannot be shared out evenly.
        """
        self.parallel = ExpertParallel(rank, size, group)
        cut = [self.w_in, self.w_out]
        for parameter in cut:
            parameter.data = self.parallel.own(parameter.data)
        return cut


def loads(routed: Routed, experts: int) -> Tensor:
    """(E,) int64: assignments of the counted tokens to each expert."""
    chosen = routed.experts if routed.counted is None else routed.experts[routed.counted]
    return torch.bincount(chosen.reshape(-1) + 1, minlength=experts + 1)[1:]


def violation(counts: Tensor, pool: Tensor | None = None) -> Tensor:
    """(E,) float64: how far the load of each expert is above the mean of all, or of its pool (E,)."""
    load = counts.to(torch.float64)
    if pool is None:
        return load - load.mean()
    total = torch.zeros(int(pool.max()) + 1, dtype=load.dtype, device=load.device)
    size = total.index_add(0, pool, torch.ones_like(load))
    return load - (total.index_add(0, pool, load) / size.clamp(min=1))[pool]


class _Balance(torch.autograd.Function):
    """The identity on y, which gives the bias the gradient (c - mean c) SCALE whatever y's is."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, bias: Tensor, above: Tensor) -> Tensor:
        ctx.save_for_backward(above)
        ctx.dtype = bias.dtype
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (above,) = ctx.saved_tensors
        return grad, (above * SCALE).to(ctx.dtype), None
