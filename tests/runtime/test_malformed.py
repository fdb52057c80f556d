"""Malformed input of every kind: exit code 2, one sentence on stderr, no traceback, nothing left behind.

The sentence must say what `needles` holds: the field, the value, or what is allowed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from jobs_for_tests import Walk, main, walk

from raysys.runtime.run import Run
from raysys.runtime.sentences import UserError

FLAGS = {
    "unknown flag": (["--cels", "3"], ["--cels", "--cells"]),
    "flag of a group that does not exist": (["--sight.hosts", "3"], ["--sight.hosts", "--site.hosts"]),
    "text for a whole number": (["--cells", "many"], ["cells", "many", "whole number"]),
    "fraction for a whole number": (["--cells", "2.5"], ["cells", "2.5", "whole number"]),
    "below its bound": (["--cells", "0"], ["cells", "got 0", "at least 1"]),
    "above its bound": (["--cells", "1001"], ["cells", "1001", "at most 1000"]),
    "open bound reached": (["--rate", "0"], ["rate", "got 0", "greater than 0"]),
    "negative": (["--seed", "-1"], ["seed", "-1", "at least 0"]),
    "not a number": (["--rate", "nan"], ["rate", "nan"]),
    "infinite": (["--alpha", "inf"], ["alpha", "inf"]),
    "number too large": (["--seed", "9" * 40], ["seed", "less than"]),
    "not one of the choices": (["--optimizer", "adagrad"], ["optimizer", "adagrad"]),
    "no value": (["--cells"], ["cells", "no value"]),
    "empty value": (["--cells="], ["cells", "whole number"]),
    "two values for one": (["--cells", "1", "2"], ["cells", "1 2"]),
    "given twice": (["--cells", "1", "--cells", "2"], ["cells", "twice"]),
    "value for a switch": (["--wandb", "maybe"], ["maybe"]),
    "list with a bad item": (["--sizes", "1", "x"], ["sizes", "1 x", "whole numbers"]),
    "empty list": (["--sizes"], ["sizes", "at least 1"]),
    "group as a flag": (["--site", "4"], ["--site"]),
    "bad value in a group": (["--site.hosts", "-3"], ["site.hosts", "-3", "at least 1"]),
    "fields that contradict each other": (["--n", "10", "--f", "5"], ["n > 2f", "n=10", "f=5"]),
    "stray word": (["walk", "again"], ["again"]),
    "unknown command": (["wlak"], ["wlak", "did you mean walk"]),
    "no such configuration file": (["--config", "absent.yaml"], ["config", "absent.yaml", "no such file"]),
    "configuration flag without a file": (["--config"], ["config", "no value"]),
    "folder as configuration file": (["--config", "."], ["config"]),
    "no such run": (["--resume", "absent"], ["resume", "absent", "run folder"]),
    "configuration file beside resume": (["--resume", "run", "--config", "a.yaml"], ["config", "resume"]),
    "unknown storage": (["--out", "ftp://x/y"], ["ftp://x/y"]),
    "out is a file": (["--out", "a-file/runs"], ["out", "a-file"]),
}
YAML = {
    "broken syntax": ("cells: [1, 2", ["line", "YAML"]),
    "tabs": ("site:\n\thosts: 3", ["line 2", "YAML"]),
    "not a mapping": ("- cells\n- 3", ["list", "fields"]),
    "a single word": ("cells", ["str", "fields"]),
    "unknown field": ("cels: 3", ["cels", "did you mean cells"]),
    "unknown field in a group": ("site:\n  host: 3", ["site.host", "did you mean hosts"]),
    "wrong type": ("cells: lots", ["cells", "lots", "whole number"]),
    "truth value for a number": ("cells: true", ["cells", "true", "whole number"]),
    "list for a number": ("rate: [0.1]", ["rate", "[0.1]", "a number"]),
    "text for a group": ("site: here", ["site", "here"]),
    "infinity": ("rate: .inf", ["rate", "inf"]),
    "field given twice": ("cells: 3\ncells: 4", ["cells", "twice"]),
    "python object": ("out: !!python/object/apply:os.system ['true']", ["YAML"]),
    "binary": ("\x00\x01", ["YAML"]),
    "contradiction": ("n: 4\nf: 2", ["n > 2f"]),
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a-file").write_text("x")
    return tmp_path


def refused(argv: list[str], needles: list[str], capsys: pytest.CaptureFixture[str], place: Path) -> None:
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as stop:
        main(argv)
    said = capsys.readouterr()
    assert stop.value.code == 2
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1, said.err
    assert "Traceback" not in said.err
    assert len(said.err) < 400
    for needle in needles:
        assert needle in said.err
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("case", FLAGS)
def test_malformed_flags(case: str, capsys: pytest.CaptureFixture[str], place: Path) -> None:
    refused(*FLAGS[case], capsys, place)


@pytest.mark.parametrize("case", YAML)
def test_malformed_yaml(case: str, capsys: pytest.CaptureFixture[str], place: Path) -> None:
    text, needles = YAML[case]
    (place / "a.yaml").write_text(text)
    refused(["--config", "a.yaml"], needles, capsys, place)


def test_configuration_that_is_not_text(capsys: pytest.CaptureFixture[str], place: Path) -> None:
    (place / "a.yaml").write_bytes(b"\xff\xfe\x80")
    refused(["--config", "a.yaml"], ["config", "a.yaml", "UTF-8"], capsys, place)


def _remove(name: str) -> Callable[[Path], None]:
    return lambda run: (run / name).unlink()


def _write(name: str, text: str) -> Callable[[Path], None]:
    return lambda run: (run / name).write_text(text) and None


def _other_format(run: Path) -> None:
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "format": 99}))


def _other_system(run: Path) -> None:
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "system": "parse"}))


RUNS: dict[str, tuple[Callable[[Path], None], list[str], list[str]]] = {
    "without its configuration": (_remove("config.yaml"), [], ["resume", "config.yaml"]),
    "without its record": (_remove("run.json"), [], ["resume", "run.json"]),
    "record cut short": (_write("run.json", '{"format": 1, "sys'), [], ["run.json", "damaged"]),
    "record empty": (_write("run.json", ""), [], ["run.json", "damaged"]),
    "record of a later format": (_other_format, [], ["format 99", "format 1"]),
    "run of another system": (_other_system, [], ["parse", "walk"]),
    "configuration cut short": (_write("config.yaml", "cells: 3\nsite: {hos"), [], ["config.yaml", "YAML"]),
    "configuration of another job": (_write("config.yaml", "teachers: 3"), [], ["teachers", "not a field"]),
    "other value of a field": (lambda run: None, ["--cells", "9"], ["cells", "9", "started with 3"]),
    "other command": (lambda run: None, ["table"], ["'walk'", "'table'"]),
}


@pytest.mark.parametrize("case", RUNS)
def test_malformed_run_folders(case: str, capsys: pytest.CaptureFixture[str], place: Path) -> None:
    with Run.open(Walk(out=str(place / "runs"), wandb=False), system="walk", command="walk") as run:
        walk(run)
    capsys.readouterr()
    damage, words, needles = RUNS[case]
    damage(Path(run.path))
    command = [word for word in words if not word.startswith("-") and not word.isdigit()]
    flags = [word for word in words if word not in command]
    refused([*command, "--resume", run.path, *flags], needles, capsys, place)


def test_bad_input_found_after_the_folder_was_made_leaves_no_folder(place: Path) -> None:
    def job() -> None:
        with Run.open(Walk(wandb=False), system="walk", command="walk") as run:
            run.stage("a").log(0, x=1.0)
            raise UserError("data: got nothing; expected digits")

    with pytest.raises(UserError):
        job()
    assert list((place / "runs").iterdir()) == []
