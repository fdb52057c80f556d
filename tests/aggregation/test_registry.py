"""The grammar of rules, its errors, and rules written by the user."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from raysys.aggregation import PREAGGREGATORS, RULES, Pipeline, make_rule

OWN = """
import torch

def middle(stack):
    return stack.median(0).values

def trimmed(stack, f):
    return stack.sort(0).values[f:len(stack) - f].mean(0)

def spoiler(stack):
    stack[:] = 0
    return stack[0]

def wrong(stack):
    return stack
"""


@pytest.mark.parametrize("name", sorted(RULES))
@pytest.mark.parametrize("before", ["", *sorted(PREAGGREGATORS)])
def test_every_rule_is_made_by_name_alone_and_after_every_pre_aggregator(name, before):
    rule = make_rule(f"{before}+{name}" if before else name, 20, 1)
    assert rule(torch.randn(20, 30, generator=torch.Generator().manual_seed(0))).shape == (30,)


def test_options_reach_their_items():
    rule = make_rule("bucketing(size=3) + krum(neighbors=4)", 21, 2)
    assert isinstance(rule, Pipeline)
    assert rule.before[0].size == 3
    assert rule.rule.neighbors == 4


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("medain", r"'medain' .*is not a rule.*trimmed_mean"),
        ("nnm", r"'nnm' .*pre-aggregator and needs a rule after it"),
        ("median+nnm", r"'median' .*is a rule and must come last"),
        ("what+median", r"'what' .*not a pre-aggregator.*nnm"),
        ("krum(neighbours=3)", r"krum has no option 'neighbours'; it has neighbors"),
        ("krum(3)", r"options are named"),
        ("krum(neighbors=)", r"key=value"),
        ("krum(neighbors=40)", r"neighbors=40, n=20"),
        ("", r"not of the form"),
        ("nowhere_to_be_found:rule", r"cannot import nowhere_to_be_found"),
        ("torch:no_such_thing", r"torch has no function no_such_thing"),
        ("ctma(rule=trimmed_mean)", r"ctma needs a rule decided on inner products"),
        ("centered_clipping(radius=-1)", r"radius > 0, got radius=-1"),
        ("clipping(radius=0)+mean", r"radius > 0, got radius=0"),
    ],
)
def test_a_bad_specification_is_refused_with_a_sentence(spec, message):
    with pytest.raises(ValueError, match=message):
        make_rule(spec, 20, 4)


@pytest.mark.parametrize(
    ("spec", "n", "f", "message"),
    [
        ("trimmed_mean", 10, 5, r"trimmed mean needs n > 2f, got n=10, f=5"),
        ("krum", 4, 2, r"krum needs n > 2f, got n=4, f=2"),
        ("bulyan", 20, 5, r"bulyan needs n >= 4f \+ 3, got n=20, f=5"),
        ("mda", 50, 20, r"200000 at most, got n=50, f=20"),
        ("bucketing(size=5)+median", 20, 2, r"needs n > 2f, got n=4, f=2"),
        ("median", 5, -1, r"0 <= f <= n.*f=-1"),
    ],
)
def test_a_rule_names_the_numbers_it_cannot_stand(spec, n, f, message):
    with pytest.raises(ValueError, match=message):
        make_rule(spec, n, f)


def test_users_rules_from_a_file(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(OWN)
    x = torch.randn(9, 11, generator=torch.Generator().manual_seed(0))
    assert torch.equal(make_rule(f"{path}:middle", 9, 2)(x), x.median(0).values)
    torch.testing.assert_close(make_rule(f"{path}:trimmed", 9, 2)(x), make_rule("trimmed_mean", 9, 2)(x))
    torch.testing.assert_close(make_rule(f"nnm+{path}:trimmed", 9, 2)(x), make_rule("nnm+trimmed_mean", 9, 2)(x))
    before = x.clone()
    make_rule(f"{path}:spoiler", 9, 2)(x)
    assert torch.equal(x, before)
    with pytest.raises(ValueError, match=r"returned \(9, 11\), a rule returns a tensor of shape \(11,\)"):
        make_rule(f"{path}:wrong", 9, 2)(x)
    again = pickle.loads(pickle.dumps(make_rule(f"{path}:middle", 9, 2)))  # noqa: S301
    assert torch.equal(again(x), x.median(0).values)


def test_users_rules_get_finite_rows_only(tmp_path):
    path = tmp_path / "own2.py"
    path.write_text(OWN)
    x = torch.randn(9, 11, generator=torch.Generator().manual_seed(0))
    x[4] = float("nan")
    done = make_rule(f"{path}:trimmed", 9, 2).aggregate(x)
    assert done.rejected == (4,)
    torch.testing.assert_close(done.vector, make_rule("trimmed_mean", 9, 2)(x))


@pytest.mark.parametrize("name", sorted(RULES))
def test_rules_travel_by_pickle(name):
    x = np.random.default_rng(0).standard_normal((15, 12))
    rule = make_rule(f"nnm+{name}", 15, 3)
    assert np.array_equal(pickle.loads(pickle.dumps(rule))(x), rule(x))  # noqa: S301
