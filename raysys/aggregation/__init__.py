"""Robust aggregation: (n, d) -> (d,) for n vectors of which f may be anything.

    rule = make_rule("arc+nnm+trimmed_mean", n=20, f=4)
    update = rule(stack)

or in two phases over a stack that is cut by columns: `Survey.join([survey(part) for part in parts])`, then
`plan = rule.plan(whole)`, then `plan.apply(part)` for each part: bit for bit the same.
"""

from raysys.aggregation.gram import BLOCK, Survey, survey
from raysys.aggregation.pipeline import PerLayer, Pipeline
from raysys.aggregation.registry import PREAGGREGATORS, RULES, make_rule
from raysys.aggregation.rule import Aggregation, Kappa, Plan, Rule

__all__ = [
    "BLOCK",
    "PREAGGREGATORS",
    "RULES",
    "Aggregation",
    "Kappa",
    "PerLayer",
    "Pipeline",
    "Plan",
    "Rule",
    "Survey",
    "make_rule",
    "survey",
]
