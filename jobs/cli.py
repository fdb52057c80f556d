"""How every job starts: parse, check, find or start a cluster, open the run folder, work, report.

`raysys <system> [command] [flags]` is the same as `python -m jobs.<system> [command] [flags]`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

from raysys.runtime.config import JobConfig, UserError, command_line, exits
from raysys.runtime.run import Run
from raysys.runtime.session import ClusterConfig, Session


class ClusterJob(JobConfig):
    """A job that runs on a Ray cluster, embedded or not."""

    free_on_resume: ClassVar[frozenset[str]] = JobConfig.free_on_resume | {"cluster"}
    cluster: ClusterConfig = ClusterConfig()

    @property
    def distributed(self) -> bool:
        """Whether Ray is needed at all."""
        return True

    def check(self) -> None:
        """Look at what the fields point to (data, models) before anything is started or written.

        Raises:
            ValueError: one sentence for the user.
        """


Work = Callable[[Any, Run, Session], None]
Commands = Mapping[str, tuple[type[ClusterJob], Work]]


@exits
def start(system: str, commands: Commands, default: str, description: str) -> None:
    """Run one command of a job from sys.argv."""
    schemas = {name: schema for name, (schema, _) in commands.items()}
    name, config = command_line(
        schemas, default, prog=f"python -m jobs.{system}", description=description.split("\n\n")[0]
    )
    assert isinstance(config, ClusterJob)
    try:
        config.check()
    except ValueError as error:
        raise UserError(str(error)) from error
    session = Session(config.cluster)
    with session if config.distributed else nullcontext(), Run.open(config, system=system, command=name) as run:
        commands[name][1](config, run, session)


def add(*counts: Mapping[str, int]) -> dict[str, int]:
    """Sum counters by name."""
    return {key: sum(c[key] for c in counts) for key in counts[0]}


@exits
def main() -> None:
    """The console script `raysys`."""
    systems = sorted(p.stem for p in Path(__file__).parent.glob("*.py") if hasattr_main(p))
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(
            f"usage: raysys SYSTEM [COMMAND] [FLAGS]\n\nsystems: {', '.join(systems)}\n\nraysys SYSTEM --help lists its commands."
        )
        return
    if sys.argv[1] not in systems:
        raise UserError(f"system: got {sys.argv[1]!r}; allowed are {', '.join(systems)}")
    module = importlib.import_module(f"jobs.{sys.argv.pop(1)}")
    module.main()


def hasattr_main(path: Path) -> bool:
    """Whether a file of this folder is an entry point, told without importing it."""
    return path.stem not in ("__init__", "cli") and "\ndef main()" in path.read_text(encoding="utf-8")
