"""The student's predictor: from the query alone and a document's stored vector to the teacher's answer state.

Shapes: n queries, m documents, d hidden size, h hidden width of the predictor; z (m, d) stored document vectors.

The paper's predictor (Eq. 12) is `MLP(e_Q) * e_D[-1]` [P]. All variants here are affine in the document vector:

    state(q, D) = A(q) * z_D + B(q)                 A, B (n, d), both from the query alone

so with the bias-free head the log-odds fold into an inner product with what is stored (spec 2.6; ours, exact):

    log-odds = <W_T - W_F, A * z + B> = <(W_T - W_F) * A, z> + <W_T - W_F, B> = <u(q), z> + c(q)

Notable choices
- B is the same for all documents of a query: it changes no ranking and no index, but lets the state have the large common mean
  that the teacher's states have (the pure product of a centred z cannot reach them, spec 8).
- z is e_D standardised by coordinate. The standardisation is folded into u and c, so what an index stores is e_D itself: it
  depends on the teacher only, and training the predictor again needs no new index.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

Combine = Literal["mul", "film", "gated", "add", "none"]
COMBINES: tuple[str, ...] = get_args(Combine)


class Predictor(nn.Module):
    """A(q) and B(q) from a query's own answer state.

    Args:
        width: d.
        combine: `mul` A = MLP (the paper's), `film` A = 1 + MLP, `gated` A = sigmoid(MLP) and B = (1 - A) * MLP', `add` A = 1 and
            B = MLP (the ranking then ignores the query), `none` A = 0 and B = MLP (the paper's ablation without multiplication:
            all documents score alike).
        additive: for mul and film, B = MLP' instead of 0.
        layers: of each MLP, 1 to 3 (ReLU between).
        hidden: h; the paper does not state it [P?].
    """

    query_mean: Tensor
    query_std: Tensor
    document_mean: Tensor
    document_std: Tensor

    def __init__(
        self, width: int, combine: Combine = "mul", additive: bool = True, layers: int = 2, hidden: int = 256
    ) -> None:
        super().__init__()
        if combine not in COMBINES:
            raise ValueError(f"combine: got {combine!r}; allowed are {', '.join(COMBINES)}")
        if not 1 <= layers <= 3:
            raise ValueError(f"layers: got {layers}; a predictor has 1 to 3")
        self.width, self.combine = width, combine
        wants_b = combine in ("gated", "add", "none") or additive
        self.slope = _mlp(width, hidden, layers) if combine in ("mul", "film", "gated") else None
        self.shift = _mlp(width, hidden, layers) if wants_b else None
        for name in ("query", "document"):
            self.register_buffer(f"{name}_mean", torch.zeros(width))
            self.register_buffer(f"{name}_std", torch.ones(width))

    def standardise(self, kind: Literal["query", "document"], states: Tensor) -> None:
        """Take mean and standard deviation by coordinate from states (n, d) of known queries or documents."""
        std, mean = torch.std_mean(states.float(), 0, correction=0)
        floor = 1e-3 * std.mean() + 1e-12  # a coordinate that never varies tells nothing and must not blow up
        getattr(self, f"{kind}_mean").copy_(mean)
        getattr(self, f"{kind}_std").copy_(std.clamp_min(floor))

    def document(self, states: Tensor) -> Tensor:
        """z (m, d) of document states e_D (m, d)."""
        return (states - self.document_mean) / self.document_std

    def forward(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """A, B (n, d) of query states e_Q (n, d)."""
        x = (queries - self.query_mean) / self.query_std
        zero, one = torch.zeros_like(x), torch.ones_like(x)
        b = self.shift(x) if self.shift is not None else zero
        if self.slope is None:
            return (one if self.combine == "add" else zero), b
        a = self.slope(x)
        if self.combine == "gated":
            gate = torch.sigmoid(a)
            return gate, (1 - gate) * b
        return (one + a if self.combine == "film" else a), b

    def fold(self, queries: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
        """u (n, d) and c (n,): log-odds of a document = <u, e_D> + c, e_D as the teacher left it, direction = W_T - W_F (d,)."""
        a, b = self(queries)
        u = direction * a / self.document_std
        return u, (direction * b).sum(-1) - (u * self.document_mean).sum(-1)


def _mlp(width: int, hidden: int, layers: int) -> nn.Sequential:
    sizes = [width, *[hidden] * (layers - 1), width]
    parts: list[nn.Module] = []
    for i in range(layers):
        parts += [nn.ReLU()] * (i > 0) + [nn.Linear(sizes[i], sizes[i + 1])]
    return nn.Sequential(*parts)


class HyperPredictor(nn.Module):
    """The query makes a small network that scores a document's vector (after Hypencoder, arXiv 2502.05364).

    score = w_q . relu(W_q z) + <u_q, z>: not linear in z, so no inner-product index serves it. The comparison beyond rank d; our
    own re-implementation of the idea.

    Args:
        width: d. units: of the small network. hidden: of the network that makes it.
    """

    def __init__(self, width: int, units: int = 16, hidden: int = 128) -> None:
        super().__init__()
        self.units, self.width = units, width
        self.body = nn.Sequential(nn.Linear(width, hidden), nn.ReLU())
        self.first = nn.Linear(hidden, units * width)
        self.second = nn.Linear(hidden, units)
        self.linear = nn.Linear(hidden, width)

    def forward(self, queries: Tensor, z: Tensor) -> Tensor:
        """Scores (n, K) of z (n, K, d), standardised, by standardised queries (n, d)."""
        code = self.body(queries)
        weights = self.first(code).view(len(queries), self.units, self.width) / self.width**0.5
        inner = torch.relu(torch.einsum("nkd,nud->nku", z, weights))
        return (inner * self.second(code)[:, None]).sum(-1) + torch.einsum("nkd,nd->nk", z, self.linear(code))


def oracle(z: Tensor, target: Tensor, additive: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The best diagonal map of one query in closed form: least squares of target states on z, coordinate by coordinate.

        a_k = sum_D z_Dk t_Dk / sum_D z_Dk^2                          (spec 2.6; with `additive` of the centred values)

    Args:
        z: (m, d) document vectors. target: (m, d) teacher states of that query with each document.
    Returns:
        A (d,), B (d,) and the mean squared residual (scalar): no predictor of this form can have a smaller one on these pairs.
    """
    z, target = z.double(), target.double()
    z_mean = z.mean(0) if additive else torch.zeros_like(z[0])
    t_mean = target.mean(0) if additive else torch.zeros_like(z[0])
    centred = z - z_mean
    power = (centred**2).sum(0)
    a = torch.where(power > 0, (centred * (target - t_mean)).sum(0) / power.clamp_min(1e-300), torch.zeros_like(power))
    b = t_mean - a * z_mean
    return a, b, ((a * z + b - target) ** 2).mean()
