"""What a comparison measured, with intervals, and whether the paper's claims show in it.

Shapes: s seeds, n test queries of each.

Where each seed draws its own task, an interval is Student's t over the means of seeds. Where all seeds are asked the same
queries, it is a two-way percentile bootstrap over seeds and queries; with one seed, over queries. Gains are paired by query.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raysys.runtime.seeds import Seeds, Stream
from raysys.runtime.statistics import Interval, bootstrap, mean_ci, paired_bootstrap

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


def values(result: dict[str, Any], method: str, metric: str) -> F64:
    """The measured value of each test query (n,); nan where it was not asked or has no candidate."""
    return np.array([np.nan if v is None else v for v in result["values"][method][metric]], dtype=np.float64)


def interval(results: Results, method: str, metric: str, part: str = "all") -> Interval | None:
    """Mean of some test queries: all, those with a known right document, or the others; None where there are not both kinds."""
    if part != "all" and not any(any(r["unseen"]) for r in results):
        return None
    found = [values(r, method, metric) for r in results]
    chosen = [
        np.array(r["unseen"]) == (part == "withheld") if part != "all" else np.full(len(r["unseen"]), True)
        for r in results
    ]
    return _over(results, [one[which & ~np.isnan(one)] for one, which in zip(found, chosen, strict=True)])


def gain(results: Results, method: str, metric: str, over: str = "student") -> Interval | None:
    """Paired mean of `over` minus `method`, on the queries that both were asked."""
    differences = [values(r, over, metric) - values(r, method, metric) for r in results]
    return _over(results, [one[~np.isnan(one)] for one in differences])


def _over(results: Results, each: Sequence[F64]) -> Interval | None:
    """The mean of values by seed (s lists of n') with its interval, see the head of this file."""
    if not all(len(one) for one in each):
        return None
    rng = Seeds(0).rng(Stream.SHUFFLE)
    if len(each) == 1:
        return bootstrap(each[0], _mean, rng)
    if all(r["fixed"] for r in results):
        whole = np.stack(each)
        return paired_bootstrap(whole, np.zeros_like(whole), rng)
    return mean_ci([one.mean() for one in each])


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

    more, ours = "control; not in the paper", "Table 3, for our student"
    for text, source, better, worse in (
        ("the teacher beats zero-shot dense retrieval", "Table 2", "teacher", "dense"),
        ("the student beats zero-shot dense retrieval", "Table 2", "student", "dense"),
        ("the student beats a bi-encoder fine-tuned in like CPU time", "Table 2", "student", "bi_encoder"),
        ("with the MSE of states it is better than without", ours, "student", "no_mse"),
        ("with the KL of answers it is better than without", ours, "student", "no_kl"),
        ("reverse KL (w = 1) beats forward KL", ours, "reverse_kl", "forward_kl"),
        ("the MSE of states beats contrasting them", "Section 3, for our student", "student", "contrastive"),
        ("our changes to predictor and loss beat the paper's", more, "student", "paper_student"),
        ("distillation beats the same adapter trained on labels (InfoNCE)", more, "student", "infonce"),
        ("states teach more than scores: JEPA beats listwise distillation", more, "student", "listwise"),
        ("the student beats a classifier over known documents", more, "student", "classifier"),
        ("on-policy documents beat random ones", more, "on_policy", "random_documents"),
    ):
        claim(f"{text} (R@1)", source, [better, worse], above(better, worse))
    claim("the student is within 5 points of its teacher's R@1 (mean)", "Table 2", ["student", "teacher"], keeps_up)
    claim("without multiplication all documents score alike: R@1 = 1/m", "Table 3; exact", ["no_mul"], chance)
    return found
