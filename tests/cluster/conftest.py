"""Machines and heads that end with the test module."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from machines import START_S, Head, Machine, free_ports, ports_of_a_node


@pytest.fixture(scope="module")
def make_machine() -> Iterator[Callable[[], Machine]]:
    made: list[Machine] = []

    def make() -> Machine:
        made.append(Machine.make())
        return made[-1]

    yield make
    for machine in made:
        machine.destroy()


@pytest.fixture(scope="module")
def start_head(make_machine: Callable[[], Machine]) -> Callable[..., Head]:
    """start_head(*flags, port=None, **variables): `ray start --head` on a new machine, on ports of its own."""

    def start(*flags: str, port: int | None = None, **variables: str) -> Head:
        machine = make_machine()
        port, dashboard = port or free_ports(1)[0], free_ports(1)[0]
        words = [
            "ray",
            "start",
            "--head",
            f"--port={port}",
            f"--dashboard-port={dashboard}",
            *ports_of_a_node(),
            *flags,
        ]
        machine.done(*words, timeout=START_S, **variables)
        return Head(machine, f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}")

    return start
