"""The project files agree with each other."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIRED = [Requirement(line) for line in PROJECT["dependencies"]]
EXTRAS = PROJECT["optional-dependencies"]
DEVELOPMENT = [Requirement(line) for line in EXTRAS["dev"] + EXTRAS["text"] + EXTRAS["retrieval"] + EXTRAS["deepspeed"]]


def exact() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[^\s+@]+", line) for line in lines), (
        "exact versions, no paths, no suffixes"
    )
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}


@pytest.mark.parametrize("requirement", REQUIRED + DEVELOPMENT, ids=str)
def test_every_dependency_has_an_exact_tested_version(requirement: Requirement) -> None:
    assert requirement.specifier.contains(exact()[canonicalize_name(requirement.name)])


@pytest.mark.parametrize("requirement", REQUIRED + DEVELOPMENT, ids=str)
def test_every_dependency_is_explained(requirement: Requirement) -> None:
    page = (ROOT / "docs" / "dependencies.md").read_text()
    assert re.search(rf"^\| {re.escape(requirement.name)}(\[[a-z,]+\])? \|", page, re.MULTILINE)


def test_torch_is_pinned() -> None:
    assert exact()["torch"] == "2.13.0"


def test_the_version_is_written_once_more_and_equal() -> None:
    import raysys

    assert PROJECT["version"] == raysys.__version__
