"""Policy objectives over log-probabilities, one function per idea, so that each can be tested against its closed form.

Shapes: B answers (G for each query), n tokens of the longest; log-probabilities, masks and weights (B, n); advantages (B,).

Three policies meet here: `infer`, the rollout engine that drew a token; `old`, the training engine at the weights the iteration
began with; `new`, the training engine at the weights that are being changed. A mask is True where a token was drawn: padding,
the prompt and hints are not.

Notable choices
- IcePop (eqs. 1, 2), TIS and WPSM (eq. 4) are weights without gradient that multiply the surrogate, so each goes with each.
  MISC (eq. 3) is GSPO's sequence-level ratio with IcePop's token-level weight.
- GSPO is in its token form, s_ij = sg[s_i] pi_ij / sg[pi_ij] (INFERRED for MISC, whose printed form leaves the sum over tokens
  out): it has the value and, without a mask, the gradient of the sequence form; a mask then removes gradients token by token.
- `old` is computed when the answer is trained on, not when it was drawn (INFERRED), so that rho = old / infer measures both the
  engines' mismatch and, for answers that began under older weights, their age.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from raysys.systems.ernie.rl.setting import ObjectiveSetting

Average = Literal["sequence", "token"]


class Judged(NamedTuple):
    """What an update needs of B answers; only `new` carries a gradient."""

    new: Tensor
    old: Tensor
    infer: Tensor
    mask: Tensor
    advantage: Tensor
    entropy: Tensor
    """(B, n) entropy of the training engine's next-token distribution."""
    rate: Tensor
    """(B,) success rate of the answer's query so far, acc_x."""


def group_advantages(rewards: Tensor, group: int, scale: bool = True) -> Tensor:
    """A_i = (R_i - mean) / std within each query's `group` neighbouring answers (GRPO); equal rewards give exactly 0.

    Args:
        rewards: (B,), B a multiple of `group`.
        scale: divide by the standard deviation; without it only the mean is removed (Dr. GRPO).
    """
    grouped = rewards.view(-1, group)
    centred = grouped - grouped.mean(1, keepdim=True)
    equal = (grouped == grouped[:, :1]).all(1, keepdim=True)
    centred = centred.masked_fill(equal, 0.0)
    if scale:
        centred = centred / grouped.std(1, unbiased=False, keepdim=True).clamp_min(1e-6)
    return centred.reshape(-1)


def informative(rewards: Tensor, group: int) -> Tensor:
    """(B,) True for answers of queries whose rewards differ: the ones DAPO's dynamic sampling keeps.

    DAPO draws other queries in place of the rest. Here the batch is fixed (that is what U-RB is for), so the rest is left out of
    the average only (INFERRED).
    """
    grouped = rewards.view(-1, group)
    return (grouped != grouped[:, :1]).any(1, keepdim=True).expand(-1, group).reshape(-1)


def log_ratio(above: Tensor, below: Tensor, mask: Tensor) -> Tensor:
    """above - below where the mask holds, else 0 (whatever lies there, infinities included)."""
    zero = above.new_zeros(())
    return torch.where(mask, above, zero) - torch.where(mask, below, zero)


def token_mean(values: Tensor, mask: Tensor) -> Tensor:
    """(B,) mean of (B, n) values over each answer's tokens; 0 for an answer without any."""
    return (values * mask).sum(1) / mask.sum(1).clamp_min(1)


def averaged(values: Tensor, mask: Tensor, average: Average = "sequence") -> Tensor:
    """One number of (B, n): 1/B sum_i 1/|y_i| sum_j, or over all tokens alike (DAPO's `token`)."""
    if average == "token":
        return (values * mask).sum() / mask.sum().clamp_min(1)
    return token_mean(values, mask).sum() / mask.any(1).sum().clamp_min(1)


def clipped(ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """min(r A, clip(r, 1 - low, 1 + high) A), r (B, n)."""
    a = advantage[:, None]
    return torch.minimum(ratio * a, ratio.clamp(1 - low, 1 + high) * a)


def token_ratio(new: Tensor, old: Tensor, mask: Tensor) -> Tensor:
    """r_ij = pi_new / pi_old (B, n)."""
    return log_ratio(new, old, mask).exp()


def sequence_ratio(new: Tensor, old: Tensor, mask: Tensor) -> Tensor:
    """s_i = exp(1/|y_i| sum_j log r_ij) (B,) [GSPO]."""
    return token_mean(log_ratio(new, old, mask), mask).exp()


def sequence_token_ratio(new: Tensor, old: Tensor, mask: Tensor) -> Tensor:
    """s_ij = sg[s_i] pi_ij / sg[pi_ij] (B, n) [GSPO-token]."""
    shift = log_ratio(new, new.detach(), mask)
    return sequence_ratio(new.detach(), old, mask)[:, None] * shift.exp()


def grpo(
    new: Tensor, old: Tensor, mask: Tensor, advantage: Tensor, *, low: float = 0.2, high: float = 0.2,
    weight: Tensor | None = None, average: Average = "sequence",
) -> Tensor:  # fmt: skip
    """-J of GRPO with token ratios; with IcePop's weight (B, n) it is eq. 1, with high > low and average token DAPO's."""
    value = clipped(token_ratio(new, old, mask), advantage, low, high)
    return -averaged(value if weight is None else value * weight, mask, average)


def gspo(
    new: Tensor, old: Tensor, mask: Tensor, advantage: Tensor, *, low: float = 3e-4, high: float = 4e-4,
    weight: Tensor | None = None, average: Average = "sequence",
) -> Tensor:  # fmt: skip
    """-J of GSPO; with IcePop's weight of the whole answer it is eq. 2, with the token's weight MISC, eq. 3."""
    value = clipped(sequence_token_ratio(new, old, mask), advantage, low, high)
    return -averaged(value if weight is None else value * weight, mask, average)


def icepop(old: Tensor, infer: Tensor, mask: Tensor, lower: float, upper: float, level: Average = "token") -> Tensor:
    """M(rho) (B, n): rho = pi_old / pi_infer where lower <= rho <= upper, else 0 [eqs. 1 to 3].

    Args:
        level: token [eqs. 1, 3]; sequence: one rho for an answer, the geometric mean over its tokens [eq. 2; the mean INFERRED].
    """
    rho = mismatch(old, infer, mask, level)
    return rho * ((rho >= lower) & (rho <= upper))


def truncated(old: Tensor, infer: Tensor, mask: Tensor, cap: float, level: Average = "token") -> Tensor:
    """min(rho, cap) (B, n): truncated importance sampling, the usual alternative to IcePop."""
    return mismatch(old, infer, mask, level).clamp_max(cap)


def mismatch(old: Tensor, infer: Tensor, mask: Tensor, level: Average = "token") -> Tensor:
    """rho (B, n) without gradient."""
    logs = log_ratio(old.detach(), infer.detach(), mask)
    if level == "sequence":
        logs = token_mean(logs, mask)[:, None].expand_as(logs)
    return logs.exp()


def mastered(
    entropy: Tensor, mask: Tensor, rate: Tensor, advantage: Tensor, alpha: float, eta: float, tau: float, *,
    only_positive: bool = True,
) -> Tensor:  # fmt: skip
    """1 - M_i (B,) of WPSM [eq. 4]: M_i = alpha where H(y_i) < eta and acc_x > tau, else 0; alpha 1 drops such answers.

    Args:
        only_positive: only answers with a positive advantage are down-weighted, as the method's name has it; the printed
            equation does not say so (INFERRED).
    """
    known = (token_mean(entropy.detach(), mask) < eta) & (rate > tau)
    if only_positive:
        known &= advantage > 0
    return 1 - alpha * known.to(advantage.dtype)


def clip_fraction(ratio: Tensor, advantage: Tensor, mask: Tensor, low: float, high: float) -> float:
    """Share of tokens whose gradient the clip removes."""
    a = advantage[:, None]
    cut = ((a > 0) & (ratio > 1 + high)) | ((a < 0) & (ratio < 1 - low))
    return float((cut & mask).sum() / mask.sum().clamp_min(1))


def train_infer_kl(old: Tensor, infer: Tensor, mask: Tensor) -> float:
    """KL(train || infer) by token, from tokens that infer drew: the mean of rho log rho - rho + 1, unbiased, never negative."""
    logs = log_ratio(old.detach(), infer.detach(), mask).double()
    return float(averaged(logs.exp() * logs - torch.expm1(logs), mask, "token"))


def loss(setting: ObjectiveSetting, judged: Judged) -> tuple[Tensor, dict[str, float]]:
    """What is minimised, as the setting has it, and its measurements."""
    new, old, infer, mask, advantage, entropy, rate = judged
    weight = torch.ones_like(old)
    if setting.correction == "icepop":
        weight = icepop(old, infer, mask, setting.lower, setting.upper, setting.level)
    elif setting.correction == "tis":
        weight = truncated(old, infer, mask, setting.upper, setting.level)
    dropped = float(((weight == 0) & mask).sum() / mask.sum().clamp_min(1))
    softened = mastered(
        entropy, mask, rate, advantage, setting.wpsm_alpha, setting.wpsm_eta, setting.wpsm_tau,
        only_positive=setting.wpsm_only_positive,
    )  # fmt: skip
    surrogate = gspo if setting.ratio == "sequence" else grpo
    value = surrogate(
        new, old, mask, advantage, low=setting.clip_low, high=setting.clip_high, weight=weight * softened[:, None],
        average=setting.average,
    )  # fmt: skip
    ratio = (sequence_token_ratio if setting.ratio == "sequence" else token_ratio)(new.detach(), old, mask)
    metrics = {
        "masked": dropped,
        "softened": float((softened < 1).double().mean()),
        "clipped": clip_fraction(ratio, advantage, mask, setting.clip_low, setting.clip_high),
        "kl_train_infer": train_infer_kl(old, infer, mask),
        "entropy": float(averaged(entropy.detach(), mask, "token")),
    }
    return value, metrics
