"""What the student is trained on. One function per loss, so that each can be tested against its closed form.

Shapes: n queries of a batch, K documents each; logits (n, K, V), log-odds (n, K), states (n, K, d).

The paper's objective (Eqs. 11, 13) [P]:  F = MSE(state_S, state_T) + w KL(P_S || P_T), P = softmax of the language head at the
answer position. Everything else here is a control or an ablation.

Why reverse KL alone collapses (spec 5.3, check 17): with two labels its gradient in the log-odds z is p_S (1 - p_S) (z_S - z_T),
which vanishes as p_S -> 0; where nearly all documents are F, "always F" is a flat place. Forward KL's is p_S - p_T, which is not.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(P_S || P_T), the mean over all but the last axis of logits (..., V) [P, Eq. 13]."""
    log_s, log_t = student.log_softmax(-1), teacher.log_softmax(-1)
    return (log_s.exp() * (log_s - log_t)).sum(-1).mean()


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(P_T || P_S), the paper's ablation [P, Table 3]."""
    return reverse_kl(teacher, student)


def jensen_shannon(student: Tensor, teacher: Tensor, beta: float = 0.5) -> Tensor:
    """Generalised JSD of GKD (arXiv 2306.13649): beta KL(P_T || M) + (1 - beta) KL(P_S || M), M = beta P_T + (1 - beta) P_S."""
    log_s, log_t = student.log_softmax(-1), teacher.log_softmax(-1)
    share = log_t.new_tensor([beta, 1 - beta]).log()
    middle = torch.logaddexp(log_t + share[0], log_s + share[1])
    from_t = (log_t.exp() * (log_t - middle)).sum(-1).mean()
    from_s = (log_s.exp() * (log_s - middle)).sum(-1).mean()
    return beta * from_t + (1 - beta) * from_s


def sampled_reverse_kl(student: Tensor, teacher: Tensor, samples: int, generator: torch.Generator) -> Tensor:
    """On-policy policy gradient of the reverse KL: the student draws answers, the teacher judges them.

    The answer is one token, so with a ~ P_S and r = log P_S(a) - log P_T(a) the gradient of mean(r log P_S(a)), r held fixed, has
    the exact KL's gradient as its expectation. The value is the gradient's carrier, not the KL.
    """
    log_s, log_t = student.log_softmax(-1), teacher.log_softmax(-1)
    flat = log_s.detach().exp().reshape(-1, log_s.shape[-1])
    drawn = torch.multinomial(flat, samples, replacement=True, generator=generator).view(*log_s.shape[:-1], samples)
    chosen_s, chosen_t = log_s.gather(-1, drawn), log_t.gather(-1, drawn)
    return ((chosen_s - chosen_t).detach() * chosen_s).mean()


def scaled_mse(student: Tensor, teacher: Tensor, variance: Tensor) -> Tensor:
    """Mean over all coordinates of (state_S - state_T)^2 / variance, `variance` (d,) of the teacher's states by coordinate.

    With variance 1 it is the paper's MSE [P, Eq. 11]. In units of the variance, single coordinates of huge size, which large
    language models have, do not drown the others, and w means the same for every backbone [ours].
    """
    return ((student - teacher) ** 2 / variance).mean()


def contrastive_states(student: Tensor, teacher: Tensor, temperature: float = 0.1) -> Tensor:
    """InfoNCE between states (n, K, d) instead of the MSE: each predicted state finds the teacher's own among the K of its query.

    The paper's reason for the MSE is "convergence and stability" against this alternative.
    """
    logits = F.normalize(student, dim=-1) @ F.normalize(teacher, dim=-1).transpose(1, 2) / temperature
    own = torch.arange(student.shape[1], device=student.device).expand(len(student), -1)
    return F.cross_entropy(logits.flatten(0, 1), own.flatten())


def margin_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """MarginMSE (arXiv 2010.02666) on log-odds (n, K): margins of the first document, the positive, over the others."""
    return F.mse_loss(student[:, :1] - student[:, 1:], teacher[:, :1] - teacher[:, 1:])


def listwise_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(softmax_K teacher || softmax_K student) over the K documents of each query."""
    return forward_kl(student / temperature, teacher / temperature)


def info_nce(scores: Tensor, excluded: Tensor) -> Tensor:
    """-log softmax of the first document among K; `excluded` (n, K) marks other positives, which are no wrong answers."""
    return -scores.masked_fill(excluded, -torch.inf).log_softmax(-1)[:, 0].mean()


def answer_loss(logits: Tensor, positive: Tensor, labels: tuple[int, int]) -> Tensor:
    """Cross-entropy of the answer token over the whole vocabulary, logits (n, V): T for positives (n,), F for others [P]."""
    true, false = labels
    return F.cross_entropy(logits, torch.where(positive, true, false))


def preference_loss(log_odds: Tensor, reference: Tensor, positive: Tensor, beta: float = 0.1) -> Tensor:
    """DPO of the answer (LaHoRe-DPO [P]): T preferred to F on positives and F to T on the others, against a frozen reference.

    -log sigmoid(beta s (z - z_ref)), s = +1 on positives and -1 on the others: log P(T) - log P(F) is the log-odds z.
    """
    sign = positive.to(log_odds.dtype) * 2 - 1
    return -F.logsigmoid(beta * sign * (log_odds - reference)).mean()
