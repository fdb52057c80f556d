"""Which factor a method trains and which it mixes, round by round, and how: all published methods in one table.

W_i = W0 + s B_i A_i. Averaging A and B apart makes cross-client products; methods differ in how they avoid or bear them
(specs/tad_lora.md, section 4).

Notable choices
- Where a method alternates, B comes first: with B = 0 the gradient of A is exactly zero, and a first phase of A would be lost.
  The paper does not say; this is forced.
- "stack" and "residual" change the frozen weights, which then are the same at all peers only if everyone hears everyone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

How = Literal["factors", "product", "stack", "residual", "aligned"]
Schedule = Callable[[int], str]
"""Round -> "AB", "A", "B" or "" (none)."""


@dataclass(frozen=True)
class Policy:
    """One method."""

    trains: Schedule
    """Factors that learn in a round; the others are frozen."""
    mixes: Schedule
    """Factors that are sent and mixed after it."""
    how: How = "factors"
    """factors: A_i <- sum_j W_ij A_j, and so B. product: the best rank-r approximation of sum_j W_ij B_j A_j. stack: the exact
    mean product goes into W0 and the adapters start anew. residual: mean factors, and what their product lacks goes into W0.
    aligned: each sender's factors are first rotated towards the receiver's."""

    @property
    def changes_base(self) -> bool:
        """Whether W0 + shift is trained, so that all peers must hear all others."""
        return self.how in ("stack", "residual")


def always(factors: str) -> Schedule:
    """The same factors in every round."""
    return lambda round: factors


def alternating(interval: int) -> Schedule:
    """B for `interval` rounds, then A, and so on: phase floor(t / T) mod 2."""
    return lambda round: "B" if (round // interval) % 2 == 0 else "A"


def make_policy(method: str, interval: int) -> Policy:
    """The policy of a method; `interval` T is used by adf and tad only.

    Raises:
        ValueError: an unknown method, or T < 1.
    """
    if method not in METHODS:
        raise ValueError(f"method: got {method!r}; allowed are {', '.join(METHODS)}")
    if interval < 1:
        raise ValueError(f"interval: got {interval}; expected a whole number of at least 1")
    return METHODS[method](interval)


METHODS: dict[str, Callable[[int], Policy]] = {
    # Lower anchor: nobody talks.
    "local": lambda T: Policy(always("AB"), always("")),
    # Upper anchor: one node with everyone's data (the setting makes it one peer).
    "centralised": lambda T: Policy(always("AB"), always("")),
    # FedIT (Zhang et al. 2023) with a server, Dec-LoRA (Ghiasvand et al. 2025) without.
    "lora": lambda T: Policy(always("AB"), always("AB")),
    # FFA-LoRA (Sun et al. 2024): A stays at its common start, so B A is linear in what is mixed.
    "ffa": lambda T: Policy(always("B"), always("B")),
    # RoLoRA (Chen et al. 2024): every round the other factor, and only that one is mixed.
    "rolora": lambda T: Policy(alternating(1), alternating(1)),
    # ADF-LoRA (arXiv 2511.18291): every T rounds the other factor, both are mixed; T is given.
    "adf": lambda T: Policy(alternating(T), always("AB")),
    # TAD-LoRA (arXiv 2602.00451): the same with T chosen by the contraction rate of the graph process.
    "tad": lambda T: Policy(alternating(T), always("AB")),
    # FedSA-LoRA (Guo et al. 2024): A is shared, B stays personal.
    "fedsa": lambda T: Policy(always("AB"), always("A")),
    # FLoRA (Wang et al. 2024): stacked factors give the exact mean, merged into W0.
    "flora": lambda T: Policy(always("AB"), always("AB"), "stack"),
    # FedEx-LoRA (Singhal et al. 2024): mean factors, and the exact residual goes into W0.
    "fedex": lambda T: Policy(always("AB"), always("AB"), "residual"),
    # DeCAF (gossip), FlexLoRA (Bai et al. 2024, server): mix products, cut back to rank r.
    "decaf": lambda T: Policy(always("AB"), always("AB"), "product"),
    # FedRot-like Procrustes alignment before mixing.
    "procrustes": lambda T: Policy(always("AB"), always("AB"), "aligned"),
}
