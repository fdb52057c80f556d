"""Typed configurations, and the command line and YAML files made from them.

Notable choices
- One class is the schema of the YAML file, the command line and the documentation: pydantic validates, tyro parses and
  prints `--help` from the text under each field. Frozen, and unknown fields are refused.
- Whatever the user got wrong is told in one sentence: field, value, what is allowed (`UserError`); nothing has been
  written by then.
- The first word of the command line picks the command; without one it is the default command, or, with `--resume`, the
  command of the run that is resumed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, ClassVar, ParamSpec, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from raysys.runtime.flags import check_words, parse
from raysys.runtime.record import Record
from raysys.runtime.sentences import UserError, allowed, closest, explain, unwrap
from raysys.runtime.storage import Storage

P = ParamSpec("P")


class Config(BaseModel):
    """Base of every configuration: frozen, no unknown fields, no infinities, fields documented by the text below them."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )

    presets: ClassVar[Mapping[str, Callable[[], Mapping[str, Any]]]] = {}
    """Named starting points for `--preset NAME`: functions that return the values that differ from the defaults."""

    @model_validator(mode="before")
    @classmethod
    def _a_truth_value_is_not_a_number(cls, values: Any) -> Any:
        if isinstance(values, Mapping):
            for name, field in cls.model_fields.items():
                if isinstance(values.get(name), bool) and unwrap(field.annotation) in (int, float):
                    raise ValueError(f"{name}: got {str(values[name]).lower()}; expected {allowed(field)}")
        return values

    @model_validator(mode="before")
    @classmethod
    def _left_out_fields_of_a_group_keep_the_defaults_of_where_it_is(cls, values: Any) -> Any:
        """A field `x: Group = Group(a=1)`, given {b: 2}, is Group(a=1, b=2)."""
        if not isinstance(values, Mapping):
            return values
        merged = dict(values)
        for name, field in cls.model_fields.items():
            if isinstance(merged.get(name), Mapping) and type(field.default) is field.annotation:
                merged[name] = _over(field.default.model_dump(), merged[name])
        return merged

    def with_values(self, changes: Mapping[str, Any]) -> Self:
        """A validated copy with some values changed; keys are dotted paths such as "cluster.hosts"."""
        values = self.model_dump()
        for path, value in changes.items():
            *groups, name = path.split(".")
            place = values
            for group in groups:
                if not isinstance(place.get(group), dict):
                    raise UserError(f"{path}: is not a field of {type(self).__name__}")
                place = place[group]
            place[name] = value
        return type(self).of(values)

    @classmethod
    def of(cls, values: Any, source: str = "") -> Self:
        """Validate plain values; a UserError of one sentence says what is wrong (`source` names the file, if any)."""
        if not isinstance(values, Mapping):
            raise UserError(f"{source or cls.__name__}: got {type(values).__name__}; expected fields with their values")
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise UserError(f"{source}: {explain(error, cls)}" if source else explain(error, cls)) from error

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a YAML file (a path, or any URI that pyarrow.fs opens); fields that it leaves out keep their defaults."""
        text = read_text(str(path), "config")
        try:
            values = yaml.load(text, Loader=_StrictLoader)  # noqa: S506 (a SafeLoader)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = f" at line {mark.line + 1}" if mark else ""
            why = getattr(error, "problem", None) or "unreadable characters"
            raise UserError(
                f"config: {path} is not valid YAML{where} ({why}); expected lines of 'field: value'"
            ) from error
        return cls.of({} if values is None else values, source=str(path))

    def save(self, path: str | Path) -> None:
        """Write the YAML file that `load` reads, atomically."""
        storage = Storage(str(Path(path).parent) if "://" not in str(path) else str(path).rpartition("/")[0])
        storage.write_bytes(str(path).rpartition("/")[2], self.to_yaml().encode())

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _over(under: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values, and what they leave out, group by group."""
    return {**under} | {
        name: _over(under[name], value)
        if isinstance(value, Mapping) and isinstance(under.get(name), Mapping)
        else value
        for name, value in values.items()
    }


class JobConfig(Config):
    """What every job takes."""

    free_on_resume: ClassVar[frozenset[str]] = frozenset({"out", "resume", "wandb"})
    """Fields that change where or how a run runs but not what it computes: a resumed run may be given other values."""

    out: str = Field("runs", min_length=1)
    """Folder in which the run folder is made: a path, or a URI such as s3://bucket/runs."""
    resume: str | None = None
    """Run folder (path or URI) to go on with, from its last barrier; its own configuration is used."""
    wandb: bool = True
    """Also log to Weights & Biases: offline into the run folder, online where you are logged in."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Every random number of the run derives from this one."""
    seeds: int = Field(3, ge=1, le=10_000)
    """Paired repetitions, with seeds seed, seed + 1, ...; intervals are over these."""


def command_line(
    commands: Mapping[str, type[Config]],
    default: str,
    argv: Sequence[str] | None = None,
    prog: str = "",
    description: str = "",
) -> tuple[str, Config]:
    """Parse `[command] [--config FILE.yaml] [flags]` into the command's name and its validated configuration.

    Raises UserError (see `exits`) for anything wrong, SystemExit(0) after --help.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    prog = prog or Path(sys.argv[0]).name
    named = words.pop(0) if words and not words[0].startswith("-") else None
    if named is not None and named not in commands:
        raise UserError(f"command: got {named!r}; expected one of {', '.join(commands)}{closest(named, commands)}")
    if {"-h", "--help"} & set(words):
        _help(commands, named or default, named is None, prog, description)
    resume = _value_of("--resume", words)
    recorded = Record.of(Storage(resume)).command if resume else None
    command = named or (recorded if recorded is not None and recorded in commands else default)
    schema = commands[command]
    if recorded is not None and recorded != command:
        raise UserError(f"resume: got {resume}, which is a run of {recorded!r}; expected a run of {command!r}")
    file = _take("--config", words)
    if file is not None and resume:
        raise UserError("config: got a file beside --resume; a resumed run uses its own configuration")
    preset = _take("--preset", words)
    if preset is not None and preset not in schema.presets:
        known = ", ".join(schema.presets) or "none for this command"
        raise UserError(f"preset: got {preset!r}; expected one of {known}{closest(preset, schema.presets)}")
    if preset is not None and (resume or file is not None):
        raise UserError("preset: got one beside --resume or --config; expected one source of values")
    base = (
        schema.load(_join(resume, "config.yaml"))
        if resume
        else schema.of(schema.presets[preset]())
        if preset is not None
        else schema.load(file)
        if file is not None
        else schema.of({})
    )
    given = check_words(schema, words)
    parsed = parse(schema, words, base, prog=f"{prog} {named}" if named else prog)
    config = base.with_values({path: _at(parsed, path) for path in given})
    if resume:
        refuse_changes(base, config, given)
    return command, config


def refuse_changes(saved: Config, asked: Config, given: Iterable[str]) -> None:
    """Refuse to resume a run under another configuration than its own."""
    free: frozenset[str] = getattr(type(saved), "free_on_resume", frozenset())
    for path in given:
        if path in free or path.split(".")[0] in free:
            continue
        before, now = _at(saved.model_dump(), path), _at(asked.model_dump(), path)
        if before != now:
            raise UserError(
                f"{path}: got {now}; this run was started with {before}, and a resumed run keeps its values"
            )


def exits(main: Callable[P, None]) -> Callable[P, None]:
    """Decorate a program's main: a mistake of the user ends in one sentence on stderr and exit code 2, Ctrl-C in 130."""

    @wraps(main)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            main(*args, **kwargs)
        except UserError as error:
            sentence = str(error)
        except ValidationError as error:
            sentence = explain(error, None)
        except KeyboardInterrupt as stop:
            print(f"interrupted; {stop}" if str(stop) else "interrupted", file=sys.stderr, flush=True)
            sys.exit(130)
        else:
            return
        print("error: " + " ".join(sentence.split()), file=sys.stderr, flush=True)
        sys.exit(2)

    return guarded


def read_text(path: str, field: str) -> str:
    """The text of a file that the user named in `field`."""
    folder, _, name = path.rpartition("/") if "://" in path else (os.path.dirname(path), "", os.path.basename(path))
    if name in ("", ".", ".."):
        raise UserError(f"{field}: got {path!r}; expected a file")
    try:
        return Storage(folder or ".").read_bytes(name).decode()
    except FileNotFoundError as error:
        raise UserError(f"{field}: got {path}; there is no such file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{field}: got {path}, which is not a text file; expected UTF-8") from error
    except OSError as error:
        raise UserError(f"{field}: got {path}, which cannot be read ({error.strerror or error})") from error


class _StrictLoader(yaml.SafeLoader):
    """YAML in which a field given twice is an error, not a silent choice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _help(commands: Mapping[str, type[Config]], command: str, top: bool, prog: str, description: str) -> None:
    schema = commands[command]
    about = [description] if description else []
    if top:
        about.append(
            "Commands (the first word; the flags below are those of the default, COMMAND --help lists others):"
        )
        about += [f"  {name}: {_summary(each)}{' (default)' * (name == command)}" for name, each in commands.items()]
    else:
        about.append(_summary(schema))
    if schema.presets:
        about.append(f"--preset NAME gives defaults too: {', '.join(schema.presets)}.")
    about.append("--config FILE.yaml gives defaults, which the flags below override.")
    base = schema.of({})
    usage = f"{prog} [{'|'.join(commands)}]" if top else f"{prog} {command}"
    parse(schema, ["--help"], base, prog=usage, description="\n".join(about))


def _summary(schema: type[Config]) -> str:
    return " ".join((schema.__doc__ or "").strip().split("\n\n")[0].split())


def _at(values: Mapping[str, Any], path: str) -> Any:
    place: Any = values
    for name in path.split("."):
        place = place[name]
    return place


def _value_of(flag: str, words: Sequence[str]) -> str | None:
    for i, word in enumerate(words):
        if word == flag and i + 1 < len(words) and not words[i + 1].startswith("--"):
            return None if words[i + 1] == "None" else words[i + 1]
        if word.startswith(flag + "="):
            return word.partition("=")[2]
    return None


def _take(flag: str, words: list[str]) -> str | None:
    """Remove `flag VALUE` from the words and return the value."""
    for i, word in enumerate(words):
        if word == flag:
            if i + 1 == len(words) or words[i + 1].startswith("--"):
                raise UserError(f"{flag[2:]}: got no value; expected a file")
            del words[i]
            return words.pop(i)
        if word.startswith(flag + "="):
            return words.pop(i).partition("=")[2]
    return None


def _join(folder: str, name: str) -> str:
    return folder.rstrip("/") + "/" + name
