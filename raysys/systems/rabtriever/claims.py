"""What a comparison measured, with intervals, and whether the paper's claims show in it.

Shapes: s seeds, n test queries of each.

An interval is Student's t over the means of seeds; with one seed it is the percentile bootstrap over test queries. Gains are
paired: by seed, or with one seed by query.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raysys.runtime.seeds import Seeds, Stream
from raysys.runtime.statistics import Interval, bootstrap, mean_ci, paired_difference

F64 = NDArray[np.float64]
Results = Sequence[dict[str, Any]]
COLUMNS = (
    ("R@1", "recall@1", "all"),
    ("known", "recall@1", "known"),
    ("withheld", "recall@1", "withheld"),
    ("R@10", "recall@10", "all"),
    ("MRR@10", "mrr@10", "all"),
    ("nDCG@10", "ndcg@10", "all"),
)
"""Label, measure, and which test queries: all, those with a right document known to training, or those without."""
FIDELITY = (("same first document", "top1"), ("Kendall tau", "tau"), ("energy", "energy"), ("least possible", "oracle"))
"""Label and measure of how well a student meets its teacher."""
WITHIN = 0.05
"""A student that loses at most this much of R@1 to its teacher keeps up with it."""


def values(result: dict[str, Any], method: str, metric: str, part: str = "all") -> F64:
    """The measured values of some test queries (n',) of one seed; those without a candidate are left out."""
    found = np.array([np.nan if v is None else v for v in result["values"][method][metric]], dtype=np.float64)
    unseen = np.array(result["unseen"])[: len(found)]
    chosen = {"all": np.ones_like(unseen), "known": ~unseen, "withheld": unseen}[part]
    return found[chosen & ~np.isnan(found)]


def interval(results: Results, method: str, metric: str, part: str = "all") -> Interval | None:
    """Mean over seeds with its interval; None where there are no such queries, or no two kinds of them."""
    if part != "all" and not any(any(r["unseen"]) for r in results):
        return None
    each = [values(r, method, metric, part) for r in results]
    if not all(len(one) for one in each):
        return None
    if len(each) == 1:
        return bootstrap(each[0], _mean, Seeds(0).rng(Stream.SHUFFLE))
    return mean_ci([one.mean() for one in each])


def gain(results: Results, method: str, metric: str, over: str = "student") -> Interval | None:
    """Paired mean of `over` minus `method`; None where they were asked different queries."""
    ours = [values(r, over, metric) for r in results]
    theirs = [values(r, method, metric) for r in results]
    if any(len(a) != len(b) for a, b in zip(ours, theirs, strict=True)):
        return None
    if len(ours) == 1:
        return bootstrap(ours[0] - theirs[0], _mean, Seeds(0).rng(Stream.SHUFFLE))
    return paired_difference([one.mean() for one in ours], [one.mean() for one in theirs])


def _mean(sample: F64) -> float:
    return float(sample.mean())


def percent(found: Interval, signed: bool = False) -> str:
    """ "74.3 [70.1, 78.5]"."""
    form = "+.1f" if signed else ".1f"
    if found.low is None or found.high is None:
        return f"{100 * found.mean:{form}}"
    return f"{100 * found.mean:{form}} [{100 * found.low:{form}}, {100 * found.high:{form}}]"


def mean_of(results: Results, method: str, what: str) -> float:
    """Mean over seeds of a measure of fidelity."""
    return float(np.mean([r["fidelity"][method][what] for r in results]))


def compare_claims(results: Results, data: str) -> list[dict[str, Any]]:
    """The paper's claims, and the questions that it leaves open, as far as the methods they need were run."""
    ran = set(results[0]["values"])
    found = []

    def claim(text: str, source: str, needs: Sequence[str], verdict: Any) -> None:
        if set(needs) <= ran:
            difference, holds = verdict()
            found.append({"claim": f"{data}: {text}", "source": source, "holds": holds, "interval": difference})

    def above(better: str, worse: str) -> Any:
        def verdict() -> tuple[Interval | None, bool]:
            difference = gain(results, worse, "recall@1", better)
            return difference, difference is not None and difference.above(0)

        return verdict

    def keeps_up() -> tuple[Interval | None, bool]:
        difference = gain(results, "teacher", "recall@1")
        return difference, difference is not None and difference.mean >= -WITHIN

    def chance() -> tuple[Interval | None, bool]:
        level = interval(results, "no_mul", "recall@1")
        return level, level is not None and abs(level.mean - np.mean([1 / r["documents"] for r in results])) < 1e-6

    more = "control; not in the paper"
    for text, source, better, worse in (
        ("the teacher beats zero-shot dense retrieval", "Table 2", "teacher", "dense"),
        ("the student beats zero-shot dense retrieval", "Table 2", "student", "dense"),
        ("the student beats a fine-tuned bi-encoder", "Table 2", "student", "bi_encoder"),
        ("with the MSE of states it is better than without", "Table 3", "student", "no_mse"),
        ("with the KL of answers it is better than without", "Table 3", "student", "no_kl"),
        ("reverse KL (at its own best weight) beats forward KL", "Table 3", "reverse_kl", "forward_kl"),
        ("the MSE of states beats contrasting them", "Section 3", "student", "contrastive"),
        ("distillation beats the same adapter trained on labels (InfoNCE)", more, "student", "infonce"),
        ("states teach more than scores: JEPA beats listwise distillation", more, "student", "listwise"),
        ("the student beats a classifier over known documents", more, "student", "classifier"),
        ("on-policy documents beat random ones", more, "on_policy", "random_documents"),
    ):
        claim(f"{text} (R@1)", source, [better, worse], above(better, worse))
    claim("the student is within 5 points of its teacher's R@1 (mean)", "Table 2", ["student", "teacher"], keeps_up)
    claim("without multiplication all documents score alike: R@1 = 1/m", "Table 3; exact", ["no_mul"], chance)
    return found
