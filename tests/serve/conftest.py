"""A run's adapters, and the app that serves them, once for all tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from served import KEY, damage, write_run


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six adapters, and three that are broken."""
    path = write_run(tmp_path_factory.mktemp("served") / "run", ["consensus", *(f"peer-{i:03d}" for i in range(5))])
    damage(path)
    return path


@pytest.fixture(scope="module")
def app(ray_cluster: Any, run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of the app, served over HTTP under a prefix, with a key and with small limits."""
    from ray import serve

    from serve.adapters import build

    keys = tmp_path_factory.mktemp("keys") / "keys.txt"
    keys.write_text(f"# ours\nanother-key-of-some-length\n{KEY}\n")
    guard = {"keys_file": str(keys), "max_body_kib": 16, "timeout_s": 20, "max_waiting": 40}
    serve.start(http_options={"host": "127.0.0.1", "port": 8719})
    args = {"run": str(run), "max_batch": 8, "max_adapters": 4, "max_texts": 50, "guard": guard}
    serve.run(build(args), name="adapters", route_prefix="/text")
    yield "http://127.0.0.1:8719/text"
    serve.shutdown()


@pytest.fixture(scope="module")
def client(app: str) -> Iterator[httpx.Client]:
    """A client with a key."""
    with httpx.Client(base_url=app, headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as client:
        yield client
