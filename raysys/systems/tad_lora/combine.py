"""How factors of several peers become one pair again, layer by layer; and how far averaging apart is from averaging products.

Shapes: n senders, one layer: A (n, r, d_in), B (n, d_out, r), weights w (n,) that sum to one. All in float64 or as given.

Notable choices
- Products are never formed at full size: B_cat (d_out, n r) and A_cat (n r, d_in) are reduced by QR to (n r, n r) first.
- Signs of singular vectors are fixed (largest entry of each left vector positive): the same factors on every machine.
"""

from __future__ import annotations

import torch
from torch import Tensor


def stacked(a: Tensor, b: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """B_cat (d_out, n r) and A_cat (n r, d_in) with B_cat A_cat = sum_j w_j B_j A_j exactly (FLoRA's stacking)."""
    weighted = w[:, None, None] * b
    return weighted.permute(1, 0, 2).flatten(1), a.flatten(0, 1)


def mean_product(a: Tensor, b: Tensor, w: Tensor) -> Tensor:
    """sum_j w_j B_j A_j: (d_out, d_in)."""
    b_cat, a_cat = stacked(a, b, w)
    return b_cat @ a_cat


def low_rank(b_cat: Tensor, a_cat: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Balanced factors B = U sqrt(S), A = sqrt(S) V^T of the best approximation of B_cat A_cat of that rank.

    The error is sqrt(sum of the squared singular values left out), the least possible (Eckart & Young 1936).
    Returns A (r, d_in), B (d_out, r).
    """
    q_left, r_left = torch.linalg.qr(b_cat)
    q_right, r_right = torch.linalg.qr(a_cat.T)
    u, s, vt = torch.linalg.svd(r_left @ r_right.T)
    keep = min(rank, len(s))
    left, right = q_left @ u[:, :keep], vt[:keep] @ q_right.T
    sign = left.gather(0, left.abs().argmax(0, keepdim=True)).sign()[0]
    root = s[:keep].sqrt() * torch.where(sign == 0, torch.ones_like(sign), sign)
    b, a = left * root, root[:, None] * right
    missing = rank - keep
    if missing:
        a = torch.cat([a, a.new_zeros(missing, a.shape[1])])
        b = torch.cat([b, b.new_zeros(b.shape[0], missing)], dim=1)
    return a, b


def rotated(a: Tensor, b: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Each pair (A_j, B_j) turned by the orthogonal R_j that brings R_j^T A_j closest to `reference` (r, d_in).

    R_j^T = U V^T of the SVD of reference A_j^T (Schoenemann 1966); products B_j A_j do not change.
    """
    u, _, vt = torch.linalg.svd(reference @ a.transpose(1, 2))
    turn = u @ vt
    return turn @ a, b @ turn.transpose(1, 2)


def cross_term(a: Tensor, b: Tensor) -> tuple[float, float]:
    """||C||_F^2 and ||Bbar Abar||_F^2 of one layer, C = (1/n) sum_i B_i A_i - Bbar Abar.

    Uses C = (1/n) sum_i (B_i - Bbar)(A_i - Abar) and the Gram matrices of its stacked factors (spec 2.1).
    """
    n = len(a)
    a, b = a.double(), b.double()
    a_mean, b_mean = a.mean(0), b.mean(0)
    left, right = stacked(a - a_mean, b - b_mean, torch.full((n,), 1.0 / n, dtype=a.dtype, device=a.device))
    return _square(left, right), _square(b_mean, a_mean)


def local_cross_term(a: Tensor, b: Tensor, w: Tensor) -> Tensor:
    """C_i = sum_j W_ij B_j A_j - (sum_j W_ij B_j)(sum_j W_ij A_j) of a receiver with weights w: (d_out, d_in)."""
    a_mix, b_mix = torch.tensordot(w, a, 1), torch.tensordot(w, b, 1)
    return mean_product(a, b, w) - b_mix @ a_mix


def _square(left: Tensor, right: Tensor) -> float:
    """||left right||_F^2 = tr((left^T left)(right right^T)), or of the product itself where that is the smaller matrix."""
    if left.shape[1] ** 2 > left.shape[0] * right.shape[1]:
        return float((left @ right).square().sum())
    return max(float(((left.T @ left) * (right @ right.T)).sum()), 0.0)
