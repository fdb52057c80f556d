"""From results of runs to the claims that a job reports.

Notable choices
- A claim holds only if its whole interval says so, never on a mean alone; with one seed there is no interval and no claim.
- "No difference" is a claim too, and needs the whole interval to lie within a stated margin.
- The paper's figures are for RoBERTa-large on GLUE, which does not run here: what is tested is the direction, on what is run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from raysys.runtime.statistics import Interval, mean_ci, paired_difference

Result = Mapping[str, Any]
Claim = dict[str, Any]
TAD = "TAD-LoRA, arXiv 2602.00451"
ADF = "ADF-LoRA, arXiv 2511.18291"
CLOSE = 0.03
"""Margin of "no difference": 3 points of accuracy, or 0.03 of relative error."""


def train_claims(results: Mapping[str, Sequence[Result]], method: str, score: str) -> list[Claim]:
    """The method against each other one, at the same step size, over paired seeds."""
    found = []
    better = "higher accuracy" if score == "accuracy" else "a lower error"
    for other in results:
        if other == method:
            continue
        gap = _gain(results[method], results[other], score)
        found.append(
            _claim(f"at the same step size {method} has {better} than {other}", TAD, gap.above(0), gap, "curves")
        )
    if method == "tad" and "lora" in results:
        lower = paired_difference(
            [_late_cross_term(r) for r in results["lora"]], [_late_cross_term(r) for r in results["tad"]]
        )
        text = "alternation lowers the relative cross term ||C|| / ||Bbar Abar|| below LoRA's at the same step size"
        found.append(_claim(text, TAD, lower.above(0), lower, "cross-term"))
    return found


def _gain(ours: Sequence[Result], theirs: Sequence[Result], score: str) -> Interval:
    sign = 1.0 if score == "accuracy" else -1.0
    return paired_difference([sign * r[score] for r in ours], [sign * r[score] for r in theirs])


def _late_cross_term(result: Result) -> float:
    """Mean ||C|| / ||Bbar Abar|| over the second half of training. Relative: who learns less has less to disagree on."""
    values = [row["relative_cross_term"] for row in result["curve"] if "relative_cross_term" in row]
    return float(np.mean(values[len(values) // 2 :]))


def theory_claims(
    common: Mapping[str, list[Result]],
    tuned: Mapping[str, Mapping[str, list[float]]],
    sweeps: Mapping[str, list[Result]],
    rho: Mapping[str, float],
    law: Mapping[str, int],
) -> list[Claim]:
    """Claims of the regression study, by topology from dense to sparse.

    common: rows of `study.run_arms` at one step size; tuned: errors by seed of each method at its own best step size (and T),
    chosen on other seeds; sweeps: rows over T; law: T*(rho).
    """
    names = list(common)
    dense, sparse = names[0], names[-1]
    found = []
    for other in ("lora", "rolora"):
        gap = paired_difference(_errors(common[sparse], other), best_errors(common[sparse]))
        text = f"{sparse}, all at one step size: TAD at its best T has a lower error than {other}"
        found.append(_claim(text, f"{TAD} (C2), {ADF}", gap.above(0), gap, "error-over-rho"))
        gap = paired_difference(tuned[sparse][other], tuned[sparse]["tad"])
        text = f"{sparse}, each at its own best step size: TAD at its best T has a lower error than {other}"
        found.append(_claim(text, f"{TAD} (C2), {ADF}", gap.above(0), gap, "error-tuned"))
    automatic = paired_difference(_errors(common[sparse], "lora"), _errors(common[sparse], "tad", law[sparse]))
    text = f"{sparse}, all at one step size: TAD at T = {law[sparse]}, chosen by the law, has a lower error than lora"
    found.append(_claim(text, f"{TAD} (T* law)", automatic.above(0), automatic, "error-over-rho"))
    for other in ("lora", "rolora"):
        gap = paired_difference(_errors(common[dense], other), best_errors(common[dense]))
        within = gap.low is not None and gap.high is not None and max(-gap.low, gap.high) < CLOSE
        ratio = np.mean(_errors(common[dense], other)) / np.mean(best_errors(common[dense]))
        text = f"{dense}, all at one step size: TAD and {other} are within {CLOSE:g} of each other (a factor of {ratio:.1f})"
        found.append(_claim(text, f"{TAD} (C1)", within, gap, "error-over-rho"))
    grows = paired_difference(
        np.subtract(_errors(common[sparse], "lora"), best_errors(common[sparse])),
        np.subtract(_errors(common[dense], "lora"), best_errors(common[dense])),
    )
    text = "at one step size TAD's gain over LoRA grows as the graph gets sparser"
    found.append(_claim(text, f"{TAD} (C2)", grows.above(0), grows))
    best = [best_interval(sweeps[name]) for name in sweeps]
    rising = all(x <= y for x, y in pairwise(best)) and best[-1] > best[0]
    largest = max(row["interval"] for rows in sweeps.values() for row in rows)
    edge = f" ({largest} is the largest T tried)" if largest in best else ""
    text = f"the best T, by the mean over seeds, grows with rho: {' <= '.join(map(str, best))}{edge}"
    found.append(_claim(text, f"{TAD} (C3)", rising, None, "best-interval"))
    exponent = growth_exponent([rho[name] for name in sweeps], best)
    text = f"the best T follows 1/sqrt(1 - rho): its measured exponent in 1/(1 - rho) is {exponent:.2f}, the law's 0.5"
    found.append(_claim(text, f"{TAD} (T* law)", 0.4 <= exponent <= 0.6, None, "best-interval"))
    falls = paired_difference(_series(sweeps[sparse], 1, "cross_term"), _series(sweeps[sparse], None, "cross_term"))
    found.append(
        _claim("the cross term falls with T", f"{TAD} (C6)", falls.above(0), falls, "cross-term-over-interval")
    )
    rises = paired_difference(_series(sweeps[sparse], 1, "cross_term"), _series(sweeps[dense], 1, "cross_term"))
    found.append(
        _claim("the cross term rises with rho", f"{TAD} (C6)", rises.above(0), rises, "cross-term-over-interval")
    )
    return found


def best_interval(rows: Sequence[Result]) -> int:
    """The T with the least mean error."""
    tried = [row for row in rows if row["method"] == "tad"]
    return int(min(tried, key=lambda row: float(np.mean(row["error"])))["interval"])


def growth_exponent(rho: Sequence[float], best: Sequence[int]) -> float:
    """Slope of log T* over log 1/(1 - rho): 0.5 by the law."""
    return float(np.polyfit(-np.log1p(-np.array(rho)), np.log(best), 1)[0])


def _errors(rows: Sequence[Result], method: str, interval: int = 0) -> list[float]:
    return next(row["error"] for row in rows if row["method"] == method and row["interval"] == interval)


def best_errors(rows: Sequence[Result]) -> list[float]:
    """Errors by seed of TAD at its best T, each seed's T chosen by the others: no seed is judged by a T picked on it."""
    tried = np.array([row["error"] for row in rows if row["method"] == "tad"])
    if tried.shape[1] == 1:
        return [float(tried.min())]
    others = tried.sum(1, keepdims=True) - tried
    return [float(tried[chosen, seed]) for seed, chosen in enumerate(others.argmin(0))]


def _series(rows: Sequence[Result], interval: int | None, name: str) -> list[float]:
    """A measurement by seed at some T (None: the largest)."""
    tried = [row for row in rows if row["method"] == "tad"]
    row = (
        max(tried, key=lambda r: r["interval"])
        if interval is None
        else next(r for r in tried if r["interval"] == interval)
    )
    return row[name]


def compare_claims(finals: Mapping[tuple[str, str], Sequence[Result]], topologies: Sequence[str]) -> list[Claim]:
    """Claims of a comparison at tuned step sizes: finals by (topology, method), topologies from dense to sparse. Intervals are
    Student's t over paired seeds: with three of them a bootstrap would promise too much."""
    dense, sparse = topologies[0], topologies[-1]
    found = []
    for topology in topologies:
        for (where, other), each in finals.items():
            if where == topology and other != "tad":
                gain = _gain(finals[topology, "tad"], each, "accuracy")
                source = f"{TAD} (C1, C2)" if other == "lora" else ADF
                text = f"{topology}: tad is more accurate than {other}, each at its own best step size"
                found.append(_claim(text, source, gain.above(0), gain, "accuracy-over-rho"))
    if dense != sparse and (sparse, "lora") in finals:
        a, b = ([r["accuracy"] for r in finals[t, "tad"]] for t in (sparse, dense))
        c, d = ([r["accuracy"] for r in finals[t, "lora"]] for t in (sparse, dense))
        grows = mean_ci(np.subtract(np.subtract(a, c), np.subtract(b, d)))
        found.append(
            _claim("tad's gain over lora grows as the graph gets sparser", f"{TAD} (C2)", grows.above(0), grows)
        )
    for topology in topologies:
        if (topology, "rolora") in finals and (topology, "lora") in finals:
            gap = _gain(finals[topology, "lora"], finals[topology, "rolora"], "accuracy")
            text = f"{topology}: without a server rolora is less accurate than lora"
            found.append(_claim(text, f"{ADF} (C4)", gap.above(0), gap))
    return found


def _claim(claim: str, source: str, holds: bool, interval: Interval | None, figure: str | None = None) -> Claim:
    named = f"figures/{figure}.png" if figure else None
    return {"claim": claim, "source": source, "holds": bool(holds), "interval": interval, "figure": named}
