"""Flags of the command line, checked against the fields of a configuration, then parsed by tyro.

Notable choices
- tyro reports a mistake in a box of several lines. So every flag and value is checked here first, against the same
  fields and with pydantic's own rules for them; what reaches tyro is right, save for what only all fields together show.
- tyro builds plain dicts; the configuration as a whole is validated once, by pydantic, from defaults and flags merged.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, get_args, get_origin

import tyro
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

from raysys.runtime.sentences import UserError, allowed, bounds, closest, explain, is_collection, nested, unwrap


def fields_of(schema: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Dotted path and field of everything that can be set, groups of fields opened."""
    for name, field in schema.model_fields.items():
        inner = nested(field)
        if inner is not None:
            yield from fields_of(inner, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def check_words(schema: type[BaseModel], words: Sequence[str]) -> list[str]:
    """Check every flag and value against the fields; returns the dotted paths of the fields given.

    Raises UserError for an unknown flag, a flag given twice, a value that its field refuses, a stray word.
    """
    fields = dict(fields_of(schema))
    flags = {"--" + path.replace("_", "-"): path for path in fields}
    known = list(flags)
    for path, field in fields.items():
        if unwrap(field.annotation) is bool:
            group, dot, name = path.rpartition(".")
            flags[f"--{group}{dot}no-{name}".replace("_", "-")] = path
    given: dict[str, list[str]] = {}
    path = ""
    for word in words:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            path = flags.get(flag.replace("_", "-"), "")
            if not path:
                raise UserError(f"{flag}: is not a flag of this command{closest(flag, known) or '; --help lists them'}")
            if path in given:
                raise UserError(f"{path}: was given twice; expected one value")
            given[path] = [value] if equals else []
        elif not path or unwrap(fields[path].annotation) is bool:
            raise UserError(f"command line: got {word!r} where a flag was expected; flags begin with --")
        else:
            given[path].append(word)
    for path, values in given.items():
        _check_value(path, fields[path], values)
    return list(given)


def _check_value(path: str, field: FieldInfo, values: list[str]) -> None:
    kind = unwrap(field.annotation)
    if kind is bool:
        if values:
            raise UserError(f"{path}: got {values[0]}; expected no value, write --{path} or its --no- form")
        return
    if get_origin(kind) is dict:
        raise UserError(f"{path}: cannot be given as a flag; use --config with a YAML file")
    if not is_collection(field) and len(values) != 1:
        raise UserError(f"{path}: got {' '.join(values) or 'no value'}; expected {allowed(field)}")
    value: Any = values if is_collection(field) else values[0]
    if values == ["None"] and type(None) in get_args(field.annotation):
        return
    annotation: Any = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
    try:
        TypeAdapter(annotation, config=ConfigDict(allow_inf_nan=False)).validate_python(value)
    except ValidationError as error:
        shown = " ".join(values) or ("an empty list" if is_collection(field) else "nothing")
        raise UserError(explain(error, None, path=path, field=field, value=shown)) from error


def parse(schema: type[BaseModel], words: Sequence[str], base: BaseModel, prog: str, description: str = "") -> Any:
    """All values as a nested dict: those of `base`, overridden by the words. Prints help and exits on --help."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                schema, args=words, prog=prog, description=description, default=base, registry=_registry(base)
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        plain = " ".join(re.sub(r"[─-╿]|\x1b\[[0-9;]*m", " ", said.getvalue()).split())
        raise UserError(f"command line: {plain}") from stop


def _registry(base: BaseModel) -> ConstructorRegistry:
    """Tell tyro to take fields, help and defaults from the configuration class but to build plain dicts."""
    registry = ConstructorRegistry()

    @registry.struct_rule
    def plain(info: StructTypeInfo) -> StructConstructorSpec | None:
        if not (isinstance(info.type, type) and issubclass(info.type, BaseModel)):
            return None
        source = info.default if isinstance(info.default, BaseModel) else base
        fields = tuple(
            StructFieldSpec(name, field.annotation, getattr(source, name), _help_text(field))  # type: ignore[arg-type]
            for name, field in info.type.model_fields.items()
        )
        return StructConstructorSpec(instantiate=dict, fields=fields)

    return registry


def _help_text(field: FieldInfo) -> str:
    text = " ".join((field.description or "").split())
    limits = bounds(field) if nested(field) is None else ""
    return f"{text} [{limits}]" if limits else text
