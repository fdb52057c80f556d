"""The toy job of these tests, importable by name, and a run of it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from raysys.runtime.run import Run

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    from jobs_for_tests import Walk

    with Run.open(Walk(out=str(tmp_path), wandb=False), system="walk", command="walk") as run:
        yield run
