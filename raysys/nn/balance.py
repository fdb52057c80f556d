"""Balance of a mixture of experts: the bias rule as an optimizer group, auxiliary losses, and measures of load.

Shapes: N tokens, E experts, k assignments of a token.

Notable choices
- The rule b -= u sign(c - mean c) (Wang et al. 2024, arXiv 2408.15664; ERNIE 5.0 uses it) is AdamW on the gradient that
  `moe.MoE` makes: with betas (0, 0) a step is lr * g / |g|. So the counts are those of the whole step on all workers, and
  checkpoints hold the bias like any parameter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from raysys.nn.moe import MoE, Routed, loads


def parameter_groups(
    module: nn.Module, *, rate: float, speed: float, betas: tuple[float, float] = (0.9, 0.95), weight_decay: float = 0.1
) -> list[dict[str, Any]]:
    """Groups for torch.optim.AdamW of a module's trainable parameters: matrices, vectors, and the balancing biases.

    Args:
        rate: the learning rate at which a bias moves by `speed` a step. Engines set a group's rate to the step's rate times
            its `lr_scale`, so the speed is annealed with the learning rate.
        speed: u (ERNIE 5.0: 1e-4, then 1e-5, over many more steps than here).
        betas: of all groups but the biases'.
        weight_decay: of matrices; vectors and biases have none.
    """
    biases = [m.bias for m in module.modules() if isinstance(m, MoE) and m.bias.requires_grad]
    known = {id(b) for b in biases}
    rest = [p for p in module.parameters() if p.requires_grad and id(p) not in known]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if p.ndim > 1], "betas": betas, "weight_decay": weight_decay},
        {"params": [p for p in rest if p.ndim <= 1], "betas": betas, "weight_decay": 0.0},
        {"params": biases, "betas": (0.0, 0.0), "eps": 1e-30, "weight_decay": 0.0, "lr_scale": speed / rate},
    ]
    return [{"lr": rate * group.get("lr_scale", 1.0), **group} for group in groups if group["params"]]


def switch_loss(routed: Routed, experts: int) -> Tensor:
    """E sum_e f_e P_e over the counted tokens: f the share of assignments, P the mean share of score (Fedus et al. 2021,
    eq. 4-6). Exactly 1 where either is uniform; 0 without tokens."""
    scores = routed.scores if routed.counted is None else routed.scores[routed.counted]
    if not len(scores):
        return routed.scores.sum() * 0.0
    load = loads(routed, experts).to(scores.dtype)
    share = scores / scores.sum(-1, keepdim=True).clamp(min=1e-12)
    return experts * (load / load.sum().clamp(min=1) * share.mean(0)).sum()


def z_loss(logits: Tensor) -> Tensor:
    """mean_n logsumexp(logits_n)^2, logits (N, E) (Zoph et al. 2022, eq. 5); 0 without tokens."""
    return logits.logsumexp(-1).square().sum() / max(1, len(logits))


def normalized_entropy(counts: Tensor) -> Tensor:
    """-sum p log p / log E of p = counts / sum over the last dimension (..., E): 1 uniform, 0 for a single expert.

    NaN without assignments (ERNIE 5.0, section 6.4.1)."""
    p = counts.double() / counts.double().sum(-1, keepdim=True)
    return -torch.special.xlogy(p, p).sum(-1) / torch.tensor(float(counts.shape[-1])).double().log()


def max_violation(counts: Tensor) -> Tensor:
    """max c / mean c - 1 over the last dimension (..., E): 0 is balanced (Wang et al. 2024). NaN without assignments."""
    c = counts.double()
    return c.amax(-1) / c.mean(-1) - 1


def top_overlap(a: Tensor, b: Tensor, share: float = 0.25) -> float:
    """IoU of the `share` of experts that two tasks use most, by counts (E,) (ERNIE 5.0, figure 9). Ties go to lower numbers."""
    top = max(1, round(share * len(a)))
    first, second = (set(torch.argsort(c, descending=True, stable=True)[:top].tolist()) for c in (a, b))
    return len(first & second) / len(first | second)
