"""The grammar of rules, its errors, and rules written by the user."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from raysys.aggregation import PREAGGREGATORS, RULES, Pipeline, make_rule, survey

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
        ("nowhere_to_be_found:rule", r"cannot load nowhere_to_be_found \(ModuleNotFoundError"),
        ("torch:no_such_thing", r"torch has no function no_such_thing"),
        ("ctma(rule=trimmed_mean)", r"ctma needs a rule decided on inner products"),
        ("krum(neighbors=2.5)", r"krum needs neighbors of type int \| None, got 2\.5"),
        ("krum(neighbors=True)", r"krum needs neighbors of type int \| None, got True"),
        ("centered_clipping(iterations=2.5)", r"centered_clipping needs iterations of type int, got 2\.5"),
        ("bucketing(size=2.5)+median", r"bucketing needs size of type int \| None, got 2\.5"),
        ("krum(neighbors=3)*(b)", r"the options in 'krum\(neighbors=3\)\*\(b\)' are not of the form key=value"),
        ("krum(neighbors=3)(b=2)", r"are not of the form key=value"),
        ("krum(neighbors=3, neighbors=4)", r"gives neighbors twice|not of the form key=value"),
        ("nnm+ctma(rule=median)", r"ctma\(rule=median\) does not work after a pre-aggregator"),
        ("ctma(rule=bulyan)", r"ctma needs a rule decided on inner products"),
        ("ctma(rule=nnm+trimmed_mean)", r"ctma needs a rule decided on inner products"),
        ("ctma(rule='torch:median')", r"ctma needs a rule decided on inner products"),
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


def test_a_users_file_is_executed_once_until_it_changes(tmp_path):
    path, seen = tmp_path / "counted.py", tmp_path / "seen"
    path.write_text(f"open({str(seen)!r}, 'a').write('x')\ndef first(stack):\n    return stack[0]\n")
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        assert torch.equal(make_rule(f"{path}:first", 9, 2)(x), x[0])
    assert seen.read_text() == "x"
    path.write_text(path.read_text().replace("stack[0]", "stack[1] + 0"))
    assert torch.equal(make_rule(f"{path}:first", 9, 2)(x), x[1])
    assert seen.read_text() == "xx"


def test_two_files_of_one_name_are_two_modules(tmp_path):
    for folder, sign in (("a", ""), ("b", "-")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.py").write_text(
            f"import sys\ndef here():\n    return {sign}1\n"
            "def rule(stack):\n    return stack[0] * sys.modules[__name__].here()\n"
        )
    x = torch.ones(5, 2)
    made = [make_rule(f"{tmp_path / folder / 'same.py'}:rule", 5, 1) for folder in "ab"]
    assert [float(rule(x)[0]) for rule in made] == [1.0, -1.0]


@pytest.mark.parametrize(
    ("code", "error"),
    [("1 / 0", "ZeroDivisionError"), ("def rule(:", "SyntaxError"), ("raise SystemExit(3)", "SystemExit"),
     ("import no_such_thing_here", "ModuleNotFoundError")],
)  # fmt: skip
def test_users_code_that_cannot_be_executed_is_refused_with_what_it_raised(tmp_path, code, error):
    path = tmp_path / "broken.py"
    path.write_text(code)
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"'.*broken\.py:rule': cannot load .*broken\.py \({error}: "):
            make_rule(f"{path}:rule", 9, 2)


def test_only_a_users_rule_cannot_be_planned(tmp_path):
    path = tmp_path / "own3.py"
    path.write_text(OWN)
    assert make_rule("median", 9, 2).plannable
    assert make_rule("nnm+median", 9, 2).plannable
    x = torch.randn(9, 11, generator=torch.Generator().manual_seed(0))
    for spec in (f"{path}:trimmed", f"nnm+{path}:trimmed", f"bucketing(size=2)+{path}:middle"):
        rule = make_rule(spec, 9, 2)
        assert not rule.plannable
        with pytest.raises(ValueError, match="it sees whole"):
            rule.plan(survey(x))
        done = rule.aggregate(x, reference=x[0], rng=np.random.default_rng(3))
        assert done.vector.shape == (11,)
        assert torch.equal(done.vector, rule.aggregate(x, reference=x[0], rng=np.random.default_rng(3)).vector)
    plain = make_rule("nnm+trimmed_mean", 9, 2).aggregate(x, reference=x[0]).vector
    torch.testing.assert_close(make_rule(f"nnm+{path}:trimmed", 9, 2).aggregate(x, reference=x[0]).vector, plain)


def test_only_monna_trusts_a_row_by_its_number():
    trusting = [name for name in RULES if make_rule(name, 20, 1).trusts_first]
    assert trusting == ["monna"]
    assert make_rule("nnm+monna", 20, 1).trusts_first
    assert make_rule("ctma(rule=monna)", 20, 1).trusts_first
    assert not make_rule("nnm+krum", 20, 1).trusts_first


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
