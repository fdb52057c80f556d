"""From the results of runs to the rows, claims and predicted floors that a job reports.

Results are dicts as `simulate` and the actors return them; lists run over paired seeds.

Notable choices
- A claim holds only if its whole interval says so, never on a mean alone; with one seed there is no interval and no claim.
- "Worst attack" is taken per seed before averaging: an adversary chooses after seeing the run it attacks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from raysys.aggregation import Rule
from raysys.runtime.statistics import Interval, mean_ci, paired_difference
from raysys.systems.byzantine.dissimilarity import fit_dissimilarity, predicted_floor

Result = Mapping[str, Any]
PAPER = "Ruan, Wang & Liu 2026 (arXiv 2604.10179), abstract"
GOAL = "goal of this project"
CLOSE_TO_ATTACK_FREE = 0.05
TAIL = 0.25


def tail_gradient(curve: Sequence[Mapping[str, float]]) -> float:
    """Average of |grad L_H|^2 over the last quarter of the measured rounds: what is left when progress has stopped."""
    values = [row["gradient_sq"] for row in curve]
    return float(np.mean(values[-max(1, int(len(values) * TAIL)) :]))


def floor_at_fit(rule: Rule, h: int, curve: Sequence[Mapping[str, float]], alpha: float) -> float | None:
    """The worst case of spec 2.3 at (G, B, sigma) fitted along the trajectory: what the rule, as it was told, guarantees
    against any attack when steps go to zero.

    G is the envelope of the fit, so that the dissimilarity holds at every measured point. None where the rule has no
    known kappa, or kappa B^2 >= 1 and nothing is guaranteed.
    """
    if len(curve) < 2 or rule.n <= h or rule.kappa(rule.n, rule.n - h) is None:
        return None
    fit = fit_dissimilarity(
        np.array([row["dissimilarity"] for row in curve]), np.array([row["gradient_sq"] for row in curve])
    )
    sigma = float(np.sqrt(np.mean([row["noise"] for row in curve[-max(1, len(curve) // 4) :]])))
    floor = predicted_floor(rule, rule.n, rule.n - h, replace(fit, G=fit.envelope), sigma, alpha)
    return float(floor) if np.isfinite(floor) else None


def training_claims(arms: Mapping[str, Sequence[Result]], names: Mapping[str, str]) -> list[dict[str, Any]]:
    """Claims that one training comparison can test.

    Args:
        arms: results by arm, paired by seed.
        names: which arm is `robust`, `plain` (mean or gossip under attack), `free` (no attack) and, if run,
            `no_momentum`.
    """
    claims = []
    metric = "accuracy" if "accuracy" in arms[names["robust"]][0] else "excess_loss"
    better = 1.0 if metric == "accuracy" else -1.0

    def values(role: str, key: str = metric) -> list[float]:
        return [float(r[key]) for r in arms[names[role]]]

    gain = paired_difference(values("robust"), values("plain"))
    claims.append(
        _claim(
            f"robust aggregation beats {names['plain']} ({metric})",
            GOAL,
            gain.above(0) if better > 0 else gain.below(0),
            gain,
        )
    )
    if metric == "accuracy":
        cost = paired_difference(values("robust"), values("free"))
        claims.append(_claim("within 5 points of the attack-free run", GOAL, cost.above(-CLOSE_TO_ATTACK_FREE), cost))
    if "no_momentum" in names and "tail" in arms[names["robust"]][0]:
        ratio = mean_ci(
            np.log(np.maximum(values("robust", "tail"), 1e-30))
            - np.log(np.maximum(values("no_momentum", "tail"), 1e-30))
        )
        claims.append(
            _claim(
                "local momentum lowers |grad L_H|^2 at the end of training (log ratio)",
                f"{PAPER}, claim (iii)",
                ratio.below(0),
                ratio,
            )
        )
    return claims


def matrix_rows(cells: Mapping[tuple[str, str, str], Sequence[Result]]) -> list[dict[str, Any]]:
    """One row per (partition, rule, attack) and one `worst` per (partition, rule), with accuracies over seeds."""
    rows = []
    worst: dict[tuple[str, str], list[list[float]]] = {}
    for (partition, rule, attack), results in cells.items():
        accuracy = [float(r["accuracy"]) for r in results]
        rows.append({"partition": partition, "rule": rule, "attack": attack, "interval": mean_ci(accuracy)})
        if attack != "none":
            worst.setdefault((partition, rule), []).append(accuracy)
    for (partition, rule), by_attack in worst.items():
        rows.append(
            {"partition": partition, "rule": rule, "attack": "worst", "interval": mean_ci(np.min(by_attack, axis=0))}
        )
    return rows


def worst_attack(cells: Mapping[tuple[str, str, str], Sequence[Result]], partition: str, rule: str) -> str:
    """The attack with the lowest mean accuracy against a rule."""
    means = {
        a: np.mean([r["accuracy"] for r in res])
        for (p, q, a), res in cells.items()
        if (p, q) == (partition, rule) and a != "none"
    }
    return min(means, key=lambda a: means[a])


def matrix_claims(cells: Mapping[tuple[str, str, str], Sequence[Result]], plain: str = "mean") -> list[dict[str, Any]]:
    """Per partition: does the best robust rule's worst attack beat the plain rule's, and how far is it from attack-free?"""
    claims = []
    for partition in dict.fromkeys(p for p, _, _ in cells):
        rules = list(dict.fromkeys(r for p, r, _ in cells if p == partition))
        worst = {
            r: np.min(
                [
                    [float(x["accuracy"]) for x in res]
                    for (p, q, a), res in cells.items()
                    if (p, q) == (partition, r) and a != "none"
                ],
                axis=0,
            )
            for r in rules
        }
        if plain not in worst or len(rules) < 2:
            continue
        best = max((r for r in rules if r != plain), key=lambda r: float(worst[r].mean()))
        gain = paired_difference(worst[best], worst[plain])
        claims.append(
            _claim(
                f"{partition}: {best} under its worst attack beats the mean under its own by 15 points",
                GOAL,
                gain.above(0.15),
                gain,
            )
        )
        free = [float(r["accuracy"]) for r in cells.get((partition, plain, "none"), [])]
        if free:
            cost = paired_difference(worst[best], free)
            claims.append(
                _claim(
                    f"{partition}: {best} under its worst attack is within 5 points of attack-free training",
                    GOAL,
                    cost.above(-CLOSE_TO_ATTACK_FREE),
                    cost,
                )
            )
    return claims


def _claim(claim: str, source: str, holds: bool, interval: Interval) -> dict[str, Any]:
    return {"claim": claim, "source": source, "holds": holds, "interval": interval}
