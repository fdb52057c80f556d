"""Robust gossip against its limit 2b = mu_2: does the honest variance still contract?

Notable choices
- Two cliques joined by matchings: mu_2 = 2 matchings exactly, and the slow mode is one clique against the other. Every
  honest peer has b Byzantine neighbours of its own making, which tell each receiver something else (spectral attack).
- Step 1 / (mu_max + 2b) on every edge, in the form x+ = x + eta sum_j F(x_j - x): the rules are those of
  raysys/aggregation/neighbours.py, called peer by peer.

Shapes: h honest peers, d dimensions, models (h + b, d) with the Byzantine rows last.
Source: specs/byzantine.md section 2.7; Gaucher+ 2025 (2410.10418) for the impossibility.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from raysys.aggregation.neighbours import PeerRule, make_peer_rule
from raysys.attacks import Attack, Threat, make_attack
from raysys.attacks.peers import Push
from raysys.graph import Graph, complete, gossip_limit, laplacian, two_cliques

F64 = NDArray[np.float64]
Row = dict[str, Any]
DONE = 1e-20


def contraction(
    honest: Graph, b: int, rule: PeerRule, attack: Attack, start: F64, rounds: int, seed: int = 0, tell: bool = False
) -> F64:
    """(rounds + 1,) variance of the honest models over the variance at the start (h, d), b Byzantine neighbours each.

    tell: whether the adversary knows the rule (and tries it out) or pushes as far as the longest honest difference.
    """
    h = honest.n
    eta = 1.0 / (float(np.linalg.eigvalsh(laplacian(honest))[-1]) + 2 * b)
    mixing = np.zeros((h + b, h + b))
    mixing[:h, :h] = eta * honest.adjacency
    mixing[:h, h:] = mixing[h:, :h] = eta
    byzantine = list(range(h, h + b))
    near = [honest.neighbours(i) for i in range(h)]
    weights = [np.full(len(near[i]) + b, eta) for i in range(h)]
    x = torch.from_numpy(np.array(start, dtype=np.float64))
    ratios = [1.0]
    scale = float(((x - x.mean(0)) ** 2).sum())
    for t in range(rounds):
        models = torch.cat([x, x.mean(0).expand(b, -1)])
        threat = Threat(h + b, b, t, np.random.default_rng((seed, t)), rule=rule if tell else None)
        said = attack.craft_edges(models, mixing, byzantine, threat) if b else {}
        heard = [torch.stack([*x[near[i]], *(said[j, i] for j in byzantine)]) for i in range(h)]
        x = torch.stack([rule.mix(x[i], heard[i], weights[i], b) for i in range(h)])
        ratios.append(float(((x - x.mean(0)) ** 2).sum()) / scale)
        if not np.isfinite(ratios[-1]) or ratios[-1] > 1e12 or ratios[-1] < DONE:
            ratios += [ratios[-1]] * (rounds - t - 1)
            break
    return np.array(ratios)


def split_start(size: int, d: int, rng: np.random.Generator, noise: float = 0.2) -> F64:
    """(2 size, d) models that differ between the cliques: +-1 in every dimension plus noise."""
    return np.repeat([[1.0], [-1.0]], size, axis=0) + noise * rng.standard_normal((2 * size, d))


def gossip_table(
    size: int = 6,
    matchings: Sequence[int] = (1, 2, 3),
    bs: Iterable[int] = (0, 1, 2, 3, 4),
    rules: Sequence[str] = ("clip_2b",),
    attacks: Sequence[str] = ("spectral", "dissensus(epsilon=0.0)"),
    rounds: int = 120,
    d: int = 2,
    seed: int = 0,
) -> list[Row]:
    """The phase transition on two cliques: variance ratio after `rounds` rounds against 2b / mu_2.

    Below 2b = mu_2 / 2 clip-2b contracts whatever is sent (its guarantee, 2 rho b < mu_2 with rho = 2), from 2b = mu_2
    on no rule can; in between it depends on the attack. The spectral attack that does not know the rule shouts, and
    clip-2b holds until 2b = mu_2; the one that tries the rule out picks the length that moves most, and breaks it
    sooner. dissensus(epsilon=0.0) whispers: it
    repeats the receiver's own model, so that the (2b)-th longest difference is an honest one inside the clique and all
    is clipped to nothing; clip-2b then stops mixing beyond 2b = mu_2 / 2. Attacks that push are run without and with
    knowledge of the rule. Rows: graph, b, limit (2b / mu_2), rule, attack, knows_rule ("yes" or "no"), rounds, ratio,
    breaks (ratio > 1e-3).
    """
    start = split_start(size, d, np.random.default_rng(seed))
    rows: list[Row] = []
    chosen = tuple(bs)
    for k in matchings:
        graph = two_cliques(size, k)
        for b in chosen:
            for name in rules:
                for attack in attacks:
                    adversary = make_attack(attack, 2 * size + b, b)
                    for tell in (False, True) if isinstance(adversary, Push) else (False,):
                        ratios = contraction(graph, b, make_peer_rule(name), adversary, start, rounds, seed, tell)
                        rows.append(_row(graph, f"two_cliques({size}, {k})", b, name, attack, ratios, tell))
    return rows


def complete_table(
    n: int = 12,
    bs: Iterable[int] = (1, 2, 3, 4),
    rules: Sequence[str] = ("clip_2b", "nna"),
    rounds: int = 100,
    seed: int = 0,
) -> list[Row]:
    """The same on the complete honest graph, mu_2 = n, dissensus attack."""
    start = np.random.default_rng(seed).standard_normal((n, 2))
    return [
        _row(graph, f"complete({n})", b, name, "dissensus",
             contraction(graph, b, make_peer_rule(name), make_attack("dissensus", n + b, b), start, rounds, seed))
        for graph in (complete(n),) for b in bs for name in rules
    ]  # fmt: skip


def _row(graph: Graph, name: str, b: int, rule: str, attack: str, ratios: F64, tell: bool = False) -> Row:
    return {
        "graph": name, "b": b, "limit": gossip_limit(graph, b), "rule": rule, "attack": attack,
        "knows_rule": "yes" if tell else "no",
        "rounds": len(ratios) - 1, "ratio": float(ratios[-1]), "breaks": bool(ratios[-1] > 1e-3),
    }  # fmt: skip
