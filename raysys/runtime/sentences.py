"""What the user got wrong, in one sentence: the field, the value, and what is allowed.

pydantic knows the rule that was broken; this file words it. Bounds and choices are read from the field itself, so the
sentence, the `--help` text and the validator cannot disagree.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

PLAIN = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
BOUNDS: tuple[tuple[type[Any], str, str], ...] = (
    (Ge, "ge", "at least"),
    (Gt, "gt", "greater than"),
    (Le, "le", "at most"),
    (Lt, "lt", "less than"),
    (MinLen, "min_length", "at least"),
    (MaxLen, "max_length", "at most"),
)
COLLECTIONS = (list, tuple, set, frozenset)


class UserError(Exception):
    """A mistake of the user, told in one sentence: `field: got value; what is allowed`."""


def unwrap(annotation: Any) -> Any:
    """The type inside `T | None`; anything else unchanged."""
    if get_origin(annotation) in (Union, types.UnionType):
        inner = [a for a in get_args(annotation) if a is not type(None)]
        return inner[0] if len(inner) == 1 else annotation
    return annotation


def nested(field: FieldInfo) -> type[Any] | None:
    """The configuration class of a field that is a group of fields, else None."""
    kind = unwrap(field.annotation)
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def is_collection(field: FieldInfo) -> bool:
    """Whether the field takes several values."""
    return get_origin(unwrap(field.annotation)) in COLLECTIONS


def allowed(field: FieldInfo) -> str:
    """What the field accepts, in words: "a whole number of at least 1", "one of adam, sgd"."""
    number = " of ".join(filter(None, [_kind(field.annotation), bounds(field)]))
    return f"{number}, or none" if type(None) in get_args(field.annotation) else number


def bounds(field: FieldInfo) -> str:
    """The bounds alone: "at least 1 and at most 10"; empty if there are none."""
    unit = " items" if is_collection(field) else " characters" if unwrap(field.annotation) is str else ""
    words = []
    for rule in field.metadata:
        for kind, attribute, phrase in BOUNDS:
            bound = getattr(rule, attribute, None) if isinstance(rule, kind) else None
            if bound is not None and not (attribute == "min_length" and bound == 0):
                words.append(f"{phrase} {bound}{unit}")
    return " and ".join(words)


def _kind(annotation: Any) -> str:
    kind = unwrap(annotation)
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    if get_origin(kind) in COLLECTIONS:
        inner = _kind(get_args(kind)[0]).removeprefix("a ")
        return f"a list (each {inner})" if inner.startswith("one of") else f"a list of {inner.removesuffix('s')}s"
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(_kind(a) for a in get_args(kind) if a is not type(None))
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return "a group of fields with their values"
    return PLAIN.get(kind, f"a {getattr(kind, '__name__', kind)}")


def closest(word: str, known: Iterable[str]) -> str:
    """ "; did you mean X?" or nothing."""
    near = difflib.get_close_matches(word.replace("_", "-"), list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def explain(
    error: ValidationError,
    schema: type[Any] | None,
    *,
    path: str = "",
    field: FieldInfo | None = None,
    value: str | None = None,
) -> str:
    """The first thing that pydantic found wrong, as one sentence.

    `schema` is the class that was validated; `path`, `field` and `value` are given instead when one flag was checked.
    """
    problem = error.errors(include_url=False, include_context=True)[0]
    if schema is not None:
        path, field, siblings = _locate(schema, problem["loc"])
    else:
        siblings = []
        path = path or ".".join(str(part) for part in problem["loc"]) or error.title
    shown = value if value is not None else _shown(problem["input"])
    if problem["type"] == "extra_forbidden":
        hint = closest(path.rpartition(".")[2], siblings) or f"; expected one of {', '.join(siblings)}"
        return f"{path}: is not a field{hint}"
    if problem["type"] == "missing":
        return f"{path}: is missing; expected {allowed(field) if field else 'a value'}"
    if problem["type"] in ("value_error", "assertion_error"):
        said = problem["msg"].partition(", ")[2]
        return said if not path or said.startswith(f"{path}:") else f"{path}: got {shown}; {said}"
    if problem["type"] == "finite_number":
        return f"{path}: got {shown}; expected a finite number"
    if field is not None:
        return f"{path}: got {shown}; expected {allowed(field)}"
    said = problem["msg"]
    return f"{path}: got {shown}; {said[:1].lower()}{said[1:]}"


def _locate(schema: type[Any], loc: tuple[int | str, ...]) -> tuple[str, FieldInfo | None, list[str]]:
    """Dotted path, field and sibling names for a location of pydantic (which also names branches of unions)."""
    names: list[str] = []
    field: FieldInfo | None = None
    place: type[Any] | None = schema
    siblings = list(schema.model_fields)
    for part in loc:
        if place is None:
            if isinstance(part, int):
                names[-1] += f"[{part}]"
            continue
        names.append(str(part))
        siblings = list(place.model_fields)
        field = place.model_fields.get(str(part))
        place = nested(field) if field is not None else None
    return ".".join(names), field, siblings


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 80 else text[:77] + "..."
