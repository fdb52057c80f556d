"""One class is the YAML file, the command line and the documentation."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jobs_for_tests
import pytest
from jobs_for_tests import COMMANDS, Site, Table, Walk
from pydantic import ValidationError

from raysys.runtime.config import Config, command_line
from raysys.runtime.sentences import UserError


def parse(*words: str) -> tuple[str, Walk]:
    name, config = command_line(COMMANDS, "walk", words, prog="job")
    assert isinstance(config, Walk)
    return name, config


def test_no_words_mean_the_default_command_with_defaults() -> None:
    assert parse() == ("walk", Walk())


def test_the_first_word_picks_the_command() -> None:
    name, config = parse("table", "--cells", "4")
    assert (name, type(config), config.cells) == ("table", Table, 4)


def test_flags_of_every_kind_reach_their_fields() -> None:
    _, config = parse(
        "--site.hosts", "4", "--site.gpu", "--no-wandb", "--rate=1e-3", "--sizes", "5", "6", "--alpha", "0.3", "--out", "x y"
    )  # fmt: skip
    assert config == Walk(site=Site(hosts=4, gpu=True), wandb=False, rate=1e-3, sizes=(5, 6), alpha=0.3, out="x y")


def test_underscores_and_hyphens_name_the_same_flag() -> None:
    class Long(Walk):
        batch_size: int = 3

    for flag in ("--batch-size", "--batch_size"):
        _, config = command_line({"long": Long}, "long", [flag, "7"], prog="job")
        assert config == Long(batch_size=7)


def test_an_optional_field_takes_none() -> None:
    assert parse("--alpha", "None")[1].alpha is None


def test_flags_override_the_yaml_file_which_overrides_defaults(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("cells: 7\nrate: 1e-2\nsite:\n  hosts: 5\n")
    _, config = parse("--config", str(file), "--cells", "8")
    assert config == Walk(cells=8, rate=0.01, site=Site(hosts=5))


def test_a_saved_configuration_loads_as_the_same_configuration(tmp_path: Path) -> None:
    config = Walk(rate=1 / 3, sizes=(1, 2, 3), alpha=None, out="é", site=Site(gpu=True))
    config.save(tmp_path / "deep" / "c.yaml")
    assert Walk.load(tmp_path / "deep" / "c.yaml") == config


def test_an_empty_yaml_file_means_defaults(tmp_path: Path) -> None:
    (tmp_path / "e.yaml").write_text("# nothing\n")
    assert Walk.load(tmp_path / "e.yaml") == Walk()


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Walk().cells = 4  # type: ignore[misc]


def test_with_values_is_validated_and_reaches_groups() -> None:
    assert Walk().with_values({"site.hosts": 9, "cells": 2}) == Walk(cells=2, site=Site(hosts=9))
    with pytest.raises(UserError, match=r"site\.hosts: got 0; expected a whole number of at least 1"):
        Walk().with_values({"site.hosts": 0})
    with pytest.raises(UserError, match=r"sit\.hosts: is not a field"):
        Walk().with_values({"sit.hosts": 1})


def test_help_lists_commands_fields_bounds_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert stop.value.code == 0
    for part in (
        "table: All cells, as a table.",
        "--cells INT How many walks. [at least 1 and at most 1000] (default: 3)",
    ):
        assert part in text
    for part in ("--site.hosts INT", "--config FILE.yaml", "--wandb, --no-wandb"):
        assert part in text


def test_help_of_a_command_is_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse("table", "--help")
    assert stop.value.code == 0
    assert "All cells, as a table." in capsys.readouterr().out


def test_a_real_process_says_one_sentence_and_exits_with_two(tmp_path: Path) -> None:
    program = [sys.executable, jobs_for_tests.__file__, "--rouns", "3", "--out", str(tmp_path / "runs")]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(program, capture_output=True, text=True, cwd=root, env={"PYTHONPATH": str(root)}, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --rouns: is not a flag of this command; did you mean --rounds?\n"
    assert list(tmp_path.iterdir()) == []


class Inner(Config):
    depth: int = 1
    """Depth."""


class Group(Config):
    a: int = 1
    """A."""
    b: int = 1
    """B."""
    inner: Inner = Inner()
    """Inner."""


class Outer(Config):
    group: Group = Group(a=2, inner=Inner(depth=5))
    """A group whose defaults are other than its class's."""


def test_what_a_group_leaves_out_keeps_the_defaults_of_where_it_is():
    assert Outer.of({"group": {"b": 7}}).group == Group(a=2, b=7, inner=Inner(depth=5))
    assert Outer.of({"group": {"inner": {}}}).group.inner.depth == 5
    assert Outer.of({"group": {"inner": {"depth": 3}}}).group == Group(a=2, inner=Inner(depth=3))
    assert Outer().with_values({"group.b": 3}).group.a == 2
    assert Outer.of({"group": Group()}).group.a == 1  # a whole group is what it is
    with pytest.raises(UserError, match=r"group\.c"):
        Outer.of({"group": {"c": 1}})
