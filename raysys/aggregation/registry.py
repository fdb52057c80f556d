"""Names of rules, and the little grammar that makes one: "pre+pre+rule", items `name` or `name(key=value, ...)`."""

from __future__ import annotations

import ast
import inspect
import re
from typing import Any

from raysys.aggregation import coordinate, linear, preaggregate, selection
from raysys.aggregation.pipeline import Pipeline
from raysys.aggregation.preaggregate import PreAggregator
from raysys.aggregation.rule import Rule
from raysys.aggregation.user import UserRule

RULES: dict[str, type[Rule]] = {
    c.name: c
    for c in (
        linear.Mean, coordinate.Median, coordinate.TrimmedMean, coordinate.MeaMed, coordinate.Phocas,
        linear.GeometricMedian, linear.Krum, linear.MultiKrum, linear.Caf, linear.CenteredClipping,
        selection.Bulyan, selection.Mda, selection.Smea, selection.Cge, selection.Monna, selection.Dnc, selection.Ctma,
    )
}  # fmt: skip
PREAGGREGATORS: dict[str, type[PreAggregator]] = {
    c.name: c for c in (preaggregate.Nnm, preaggregate.Bucketing, preaggregate.Clipping, preaggregate.Arc)
}

_ITEM = re.compile(r"^\s*([A-Za-z_]\w*)\s*(?:\((.*)\))?\s*$", re.DOTALL)


def make_rule(spec: str, n: int, f: int) -> Rule:
    """The rule `spec` for n rows of which f may be faulty, e.g. "median", "krum(neighbors=12)", "arc+nnm+trimmed_mean".

    Raises ValueError for an unknown name (listing what exists), an unknown or bad option, and numbers n, f the rule is not
    defined for.
    """
    *before, last = split(spec)
    pres: list[PreAggregator] = []
    for item in before:
        name, options = parse_item(item)
        if name not in PREAGGREGATORS:
            kind = "is a rule and must come last" if name in RULES else "is not a pre-aggregator"
            raise ValueError(f"'{name}' in '{spec}' {kind}; pre-aggregators are {', '.join(sorted(PREAGGREGATORS))}")
        pres.append(build(PREAGGREGATORS[name], name, options, n, f))
    rows = n
    for p in pres:
        rows = p.count(rows, f)
    if ":" in last.split("(")[0]:
        own = UserRule(rows, f, last.strip())
        return Pipeline(pres, own) if pres else own
    name, options = parse_item(last)
    if name not in RULES:
        kind = "is a pre-aggregator and needs a rule after it" if name in PREAGGREGATORS else "is not a rule"
        raise ValueError(f"'{name}' in '{spec}' {kind}; rules are {', '.join(sorted(RULES))} or module:function")
    rule = build(RULES[name], name, options, rows, f)
    if pres and isinstance(rule, selection.Ctma) and rule.inner.name == "median":
        raise ValueError(
            f"'{spec}': ctma(rule=median) does not work after a pre-aggregator; use ctma(rule=geometric_median)"
        )
    return Pipeline(pres, rule) if pres else rule


def split(spec: str) -> list[str]:
    """The items of a chain: `spec` cut at the plus signs outside parentheses."""
    parts, depth = [""], 0
    for character in spec:
        depth += (character == "(") - (character == ")")
        if character == "+" and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def parse_item(item: str) -> tuple[str, dict[str, Any]]:
    """`name(key=value, ...)` as a name and options; values are Python literals or bare words."""
    found = _ITEM.match(item)
    if not found:
        raise ValueError(f"'{item.strip()}' is not of the form name or name(key=value, ...)")
    name, inside = found.groups()
    options: dict[str, Any] = {}
    if inside and inside.strip():
        try:
            call: ast.expr | None = ast.parse(f"f({inside})", mode="eval").body
        except (SyntaxError, ValueError):
            call = None
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)):
            raise ValueError(f"the options in '{item.strip()}' are not of the form key=value, ...")
        if call.args:
            raise ValueError(f"options are named: write key=value in '{item.strip()}'")
        for keyword in call.keywords:
            if keyword.arg is None:
                raise ValueError(f"options are named: write key=value in '{item.strip()}'")
            if keyword.arg in options:
                raise ValueError(f"'{item.strip()}' gives {keyword.arg} twice")
            try:
                options[keyword.arg] = ast.literal_eval(keyword.value)
            except (ValueError, TypeError):
                options[keyword.arg] = ast.unparse(keyword.value)
    return name, options


def build(cls: type, name: str, options: dict[str, Any], n: int, f: int) -> Any:
    """cls(n, f, **options), with errors that name the option."""
    return cls(n, f, **checked(name, cls, options))


def checked(label: str, cls: type, options: dict[str, Any]) -> dict[str, Any]:
    """The options, each known to `cls` and of the kind its annotation says. ValueError names the option and its value."""
    parameters = inspect.signature(cls).parameters.items()
    allowed = {k: v for k, v in parameters if k not in {"n", "f", "args", "kwargs"}}
    for key, value in options.items():
        if key not in allowed:
            raise ValueError(f"{label} has no option '{key}'; it has {', '.join(allowed) or 'none'}")
        kinds = str(allowed[key].annotation)
        fits = (value is None and "None" in kinds) or any(
            isinstance(value, kind) and (kind is bool or not isinstance(value, bool)) and word in kinds.split(" | ")
            for word, kind in (("bool", bool), ("int", int), ("float", (int, float)), ("str", str))
        )
        if not fits:
            raise ValueError(f"{label} needs {key} of type {kinds}, got {value!r}")
    return options
