"""A machine for tests of real clusters: a home, an environment and a `ray` command of its own, on this computer.

Notable choices
- Every process that belongs to the machine carries its name in an environment variable that children inherit. Its `ray`
  command is Ray's own, except that it sees these processes only: `ray stop`, which `ray down` runs on every node, would
  otherwise end every Ray on this computer, the test session's and other people's too.
- What was left when a test ends is found by the same mark and killed.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import ray  # noqa: F401  (brings its own psutil)

import psutil  # isort: skip

ROOT = Path(__file__).resolve().parents[2]
MARK = "RAYSYS_TEST_MACHINE"
START_S = 120
JOB_S = 300
ONLY_THIS_MACHINE = f"""#!{sys.executable}
import os
import ray.scripts.scripts as scripts
import psutil

def on_this_machine(process):
    try:
        return process.environ().get("{MARK}") == os.environ["{MARK}"]
    except psutil.Error:
        return False

all_processes = psutil.process_iter
psutil.process_iter = lambda *args, **kwargs: filter(on_this_machine, all_processes(*args, **kwargs))
scripts.main()
"""


@dataclass
class Machine:
    """`root` holds everything that its processes write."""

    root: Path

    @classmethod
    def make(cls) -> Machine:
        # Ray's sockets lie below; the path of a socket may have 107 characters, so not in pytest's long folder.
        machine = cls(Path(tempfile.mkdtemp(prefix="raysys-", dir="/tmp")))
        machine.home.mkdir()
        command = machine.root / "bin" / "ray"
        command.parent.mkdir()
        command.write_text(ONLY_THIS_MACHINE)
        command.chmod(0o755)
        return machine

    @property
    def home(self) -> Path:
        return self.root / "home"

    @property
    def environment(self) -> dict[str, str]:
        """Variables of a process on this machine; none of this process's own Ray or tracking settings."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "WANDB_", "PYTEST_", "PYTHONPATH"))}
        return kept | {
            MARK: self.root.name,
            "HOME": str(self.home),
            "PATH": f"{self.root / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache")),  # of fonts
            "RAY_TMPDIR": str(self.root),
            "RAY_USAGE_STATS_ENABLED": "0",
            "WANDB_MODE": "disabled",
        }

    def run(self, *words: str, timeout: float = JOB_S, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the checkout to its end; standard output and error, together, in `stdout`."""
        return subprocess.run(
            words,
            cwd=ROOT,
            env=self.environment | variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )

    def done(self, *words: str, **more: str | float) -> str:
        """What a command that must succeed printed."""
        ended = self.run(*words, **more)
        assert ended.returncode == 0, f"{shlex.join(words)} exited with {ended.returncode}:\n{ended.stdout}"
        return ended.stdout

    def processes(self) -> list[psutil.Process]:
        """What runs on this machine."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(MARK) == self.root.name and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def destroy(self) -> None:
        for _ in range(3):  # those that were being started meanwhile
            left = self.processes()
            for process in left:
                with suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(left, timeout=10)
        shutil.rmtree(self.root, ignore_errors=True)


@dataclass
class Head:
    """A started head node, and how to reach it."""

    machine: Machine
    address: str
    jobs: str

    def submit(self, *words: str, job: str, runtime_env: dict | None = None, wait: bool = True) -> str:
        """`ray job submit` of python -m jobs.byzantine, from the checkout; what was printed, the job's log included."""
        command = ["ray", "job", "submit", "--address", self.jobs, "--submission-id", job, "--working-dir", "."]
        command += ["--runtime-env-json", json.dumps(runtime_env)] * bool(runtime_env) + ["--no-wait"] * (not wait)
        return self.machine.run(*command, "--", "python", "-m", "jobs.byzantine", *words).stdout


def ports_of_a_node() -> list[str]:
    """Flags of `ray start` that keep a node off the ports that any other Ray on this computer would take."""
    client, agent = free_ports(2)
    return [
        "--node-ip-address=127.0.0.1",
        "--dashboard-host=127.0.0.1",
        f"--ray-client-server-port={client}",
        f"--dashboard-agent-listen-port={agent}",
        "--min-worker-port=0",
        "--max-worker-port=0",
    ]


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def folder_of(output: str) -> Path:
    """The run folder that a job named in its last line."""
    named = re.findall(r"^run: (.+)$", output, re.MULTILINE)
    assert named, output
    return Path(named[-1].strip())


def wait_for(happened: Callable[[], object], what: str, within: float) -> None:
    deadline = time.monotonic() + within
    while not happened():
        assert time.monotonic() < deadline, f"{what} did not happen within {within:g} s"
        time.sleep(0.25)
