"""Robustness coefficients: closed forms, the instances that attain them, and the audit's climb that must not exceed them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from raysys.aggregation import RULES, make_rule
from raysys.aggregation.audit import kappa_search
from raysys.aggregation.robustness import arc_kappa, median_kappa, nnm_kappa, price, trimmed_mean_kappa

FAR = 1e9
ROBUST = sorted(set(RULES) - {"mean", "bulyan", "smea", "mda", "cge", "monna", "centered_clipping", "dnc"})


def two_point_worst(rule, n, f):
    """Largest ratio over honest two-point sets with all faulty values at plus or minus infinity (here 1e9)."""
    worst = 0.0
    h = n - f
    for ones in range(1, h):
        for far in (FAR, -FAR):
            honest = np.concatenate([np.zeros(h - ones), np.ones(ones)])
            out = rule(np.concatenate([honest, np.full(f, far)])[:, None])[0]
            worst = max(worst, (out - honest.mean()) ** 2 / honest.var())
    return worst


@pytest.mark.parametrize("n", [10, 11, 20, 21])
@pytest.mark.parametrize("spec", ["trimmed_mean", "median"])
def test_kappa_formula_is_attained_on_two_point_sets(spec, n):
    for f in range(1, (n - 1) // 2 + 1):
        rule = make_rule(spec, n, f)
        kappa = rule.kappa(n, f)
        assert kappa.kind == "exact"
        assert two_point_worst(rule, n, f) == pytest.approx(kappa.value, abs=1e-12, rel=1e-12)


def test_kappa_values_of_appendix_b():
    assert trimmed_mean_kappa(20, 3) == pytest.approx(0.2142857, abs=1e-7)
    assert median_kappa(20, 3) == pytest.approx(1.125)
    assert median_kappa(21, 3) == pytest.approx(1.25)
    assert trimmed_mean_kappa(20, 2, trim=6) == pytest.approx(0.5)
    assert trimmed_mean_kappa(15, 1, trim=6) == pytest.approx(0.75)


@pytest.mark.parametrize(("n", "f", "trim"), [(20, 2, 6), (15, 1, 6), (11, 0, 3), (21, 4, 7)])
def test_trimming_more_than_f_costs_trim_over_n_minus_f_minus_trim(n, f, trim):
    rule = make_rule("trimmed_mean", n, trim)
    worst = 0.0
    for ones in range(1, n - f):
        honest = np.concatenate([np.zeros(n - f - ones), np.ones(ones)])
        out = rule(np.concatenate([honest, np.full(f, FAR)])[:, None])[0]
        worst = max(worst, (out - honest.mean()) ** 2 / honest.var())
    assert worst == pytest.approx(trimmed_mean_kappa(n, f, trim), rel=1e-12)
    assert worst == pytest.approx(rule.kappa(n, f).value, rel=1e-12)


def test_a_trimmed_mean_told_a_wrong_f_has_the_kappa_of_what_it_trims():
    assert make_rule("trimmed_mean", 20, 8).kappa(20, 4).value == pytest.approx(8 / (20 - 4 - 8))
    assert make_rule("trimmed_mean", 20, 2).kappa(20, 4).value == float("inf")
    assert "told f=8" in make_rule("trimmed_mean", 20, 8).kappa(20, 4).source
    with pytest.raises(ValueError, match="n > 2 trim >= 0, got n=10, trim=8"):
        make_rule("trimmed_mean", 20, 8).kappa(10, 4)


def test_trimming_less_than_f_has_no_finite_kappa():
    assert trimmed_mean_kappa(10, 3, trim=2) == float("inf")


@pytest.mark.parametrize("f", [1, 2, 3, 4])
@pytest.mark.parametrize("spec", ["trimmed_mean", "median"])
def test_climb_reaches_but_never_exceeds_an_exact_kappa(spec, f):
    rule = make_rule(spec, 10, f)
    found = kappa_search(rule, 10, f, steps=400)
    assert found.kappa == pytest.approx(rule.kappa(10, f).value, rel=1e-9)


@pytest.mark.parametrize("f", [2, 4])
def test_climb_in_two_dimensions_stays_below_the_exact_kappa(f):
    rule = make_rule("trimmed_mean", 10, f)
    assert kappa_search(rule, 10, f, steps=300, dimension=2).kappa <= price(10, f) * (1 + 1e-9)


@pytest.mark.parametrize(
    "spec", [*ROBUST, "mda", "smea", "nnm+trimmed_mean", "nnm+geometric_median", "nnm+krum", "nnm+caf"]
)
@pytest.mark.parametrize(("n", "f"), [(10, 1), (10, 4), (11, 3), (7, 3)])
def test_no_rule_is_below_the_price_of_robustness_on_the_three_point_instance(spec, n, f):
    x = np.concatenate([np.zeros(n - 2 * f), np.ones(f), -np.ones(f)])[:, None]
    out = make_rule(spec, n, f)(x)[0]
    worst = 0.0
    for honest in (x[: n - f, 0], np.delete(x[:, 0], slice(n - 2 * f, n - f))):
        worst = max(worst, (out - honest.mean()) ** 2 / honest.var())
    assert worst >= price(n, f) * (1 - 1e-12)


@pytest.mark.parametrize(
    "spec", ["krum", "multi_krum", "caf", "nnm+trimmed_mean", "nnm+median", "arc+trimmed_mean", "smea"]
)
def test_climb_stays_below_every_stated_bound_and_above_the_price(spec):
    rule = make_rule(spec, 9, 2)
    found = kappa_search(rule, 9, 2, steps=300)
    assert found.kappa >= price(9, 2) * (1 - 1e-9)
    kappa = rule.kappa(9, 2)
    assert kappa is None or found.kappa <= kappa.value


def test_witness_of_the_audit_proves_its_value():
    rule = make_rule("krum", 10, 2)
    found = kappa_search(rule, 10, 2, steps=200, dimension=2)
    honest = found.witness[found.honest]
    error = ((rule(found.witness) - honest.mean(0)) ** 2).sum()
    assert error / ((honest - honest.mean(0)) ** 2).sum(1).mean() == pytest.approx(found.kappa)


def test_lambda_measure_is_never_below_the_trace_measure():
    rule = make_rule("median", 8, 2)
    trace = kappa_search(rule, 8, 2, steps=100, dimension=3)
    top = kappa_search(rule, 8, 2, steps=100, dimension=3, measure="lambda")
    assert top.kappa >= trace.kappa * (1 - 1e-9)


def test_audit_condemns_the_mean():
    assert kappa_search(make_rule("mean", 10, 2), 10, 2, steps=200).kappa > 1e4


def test_audit_takes_any_function():
    def midrange(x: torch.Tensor) -> torch.Tensor:
        return (x.max(0).values + x.min(0).values) / 2

    assert kappa_search(midrange, 6, 1, steps=100).kappa > 100


def test_composed_bounds_follow_their_formulas():
    assert make_rule("nnm+trimmed_mean", 20, 4).kappa(20, 4).value == pytest.approx(nnm_kappa(20, 4, price(20, 4)))
    assert nnm_kappa(20, 4, price(20, 4)) == pytest.approx(8 * 4 / (20 - 8))
    assert make_rule("arc+median", 20, 4).kappa(20, 4).value == pytest.approx(arc_kappa(20, 4, median_kappa(20, 4)))
    assert make_rule("nnm+meamed", 20, 4).kappa(20, 4) is None


@pytest.mark.parametrize(
    ("spec", "n", "largest"),
    [("median", 20, 9), ("krum", 21, 10), ("bulyan", 20, 4), ("mean", 20, 0), ("nnm+median", 9, 4)],
)
def test_breakdown_is_the_largest_f_tolerated(spec, n, largest):
    assert make_rule(spec, n, 0).breakdown(n) == largest
