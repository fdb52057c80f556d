"""The Ray cluster that a job runs on: the one it finds, or one it starts.

Notable choices
- Attach before start: an initialised Ray, an explicit address, then RAY_ADDRESS (set by `ray job submit`); else an embedded
  Ray sized to the machine, which ends with the session.
- Computing processes get one thread each: hosts are the unit of parallelism, and two BLAS pools on one core halve each other.
  A single thread also makes sums independent of the machine's core count.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import ray
from pydantic import Field

from raysys.runtime.config import Config
from raysys.runtime.environment import cores
from raysys.runtime.sentences import UserError

SINGLE_THREADED = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
}


KNOCK_S = 15.0


@contextmanager
def environment_of(values: Mapping[str, str]) -> Iterator[None]:
    """Variables for processes that are started meanwhile. A Ray that is started so hands them to all its workers, those that it
    starts in advance included; for a job with an environment of its own (`runtime_env`) all are started anew."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


class ClusterConfig(Config):
    """Where a job runs and how it survives failures. Nothing here changes a result."""

    address: str | None = None
    """Ray cluster to attach to (host:port or ray://...); otherwise RAY_ADDRESS, otherwise an embedded Ray."""
    hosts: int = Field(0, ge=0, le=10_000)
    """Host processes that hold the nodes; 0 means one per CPU of the cluster."""
    cpus_per_host: float = Field(1.0, gt=0)
    """CPUs reserved for a host."""
    gpus_per_host: float = Field(0.0, ge=0)
    """GPUs reserved for a host; above 0 its nodes compute on CUDA."""
    snapshot_every: int = Field(25, ge=1)
    """Rounds between barriers: what a failure or a kill can cost at most."""
    timeout_s: float = Field(300.0, gt=0)
    """A host that owes an answer for longer than this is treated as dead."""
    start_timeout_s: float = Field(300.0, gt=0)
    """How long hosts may take to start, autoscaling included."""


class Session:
    """Context manager around a Ray cluster."""

    def __init__(self, config: ClusterConfig | None = None) -> None:
        self.config = config or ClusterConfig()
        self.embedded = self._warned = False
        self.idle: dict[str, list[Any]] = {}
        """Processes that crews have left, by the resources they hold: the next crew takes them on."""

    def __enter__(self) -> Self:
        if ray.is_initialized():
            return self
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        address = self.config.address or os.environ.get("RAY_ADDRESS")
        on_sigterm = signal.getsignal(signal.SIGTERM)
        try:
            if address:
                knock(address)
                environment = {"env_vars": SINGLE_THREADED}
                ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, runtime_env=environment)
            else:
                os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
                with environment_of(SINGLE_THREADED):
                    ray.init(
                        address="local",  # without it Ray would join whatever cluster somebody started on this machine
                        num_cpus=cores(),
                        include_dashboard=False,
                        logging_level=logging.ERROR,
                        log_to_driver=False,
                    )
        except (OSError, ValueError, RuntimeError) as error:
            where = f"the Ray cluster at {address}" if address else "an embedded Ray"
            raise UserError(
                f"address: {where} could not be reached or started ({str(error).splitlines()[0]})"
            ) from error
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own handler would end an open run without its exit code
        self.embedded = not address
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.embedded:
            ray.shutdown()

    def release(self) -> None:
        """End the processes that crews have left: what they hold is needed for something else."""
        while self.idle:
            for process in self.idle.popitem()[1]:
                ray.kill(process)

    def hosts_for(self, units: int) -> int:
        """How many hosts to start for `units` indivisible blocks of nodes.

        Raises:
            UserError: the hosts asked for need more CPUs or GPUs than the cluster has or can grow to.
        """
        have = ray.cluster_resources()
        cpus, gpus = have.get("CPU", 0.0), have.get("GPU", 0.0)
        c = self.config
        if c.hosts:
            hosts = min(c.hosts, units)
            if hosts < c.hosts and not self._warned:
                self._warned = True
                few = f"only {units} blocks of nodes exist, so {hosts} hosts start (see --block)"
                print(f"warning: cluster.hosts: got {c.hosts}; {few}", file=sys.stderr, flush=True)
        else:
            fit = cpus / c.cpus_per_host if not c.gpus_per_host else min(cpus / c.cpus_per_host, gpus / c.gpus_per_host)
            hosts = max(1, min(int(fit + 1e-9), units))
        if self.embedded and (hosts * c.cpus_per_host > cpus + 1e-9 or hosts * c.gpus_per_host > gpus + 1e-9):
            raise UserError(
                f"cluster.hosts: got {hosts} hosts of {c.cpus_per_host:g} CPUs and {c.gpus_per_host:g} GPUs;"
                f" this machine has {cpus:g} CPUs and {gpus:g} GPUs, so lower hosts or cpus_per_host"
            )
        return hosts


def knock(address: str) -> None:
    """Fail at once where nobody listens at `host:port` or `ray://host:port`; Ray itself would try for minutes.

    Raises:
        OSError: no connection within `KNOCK_S` seconds.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK_S).close()


def wait_until(deadline: float) -> float:
    """Seconds left until a time.monotonic() deadline, never negative."""
    return max(0.0, deadline - time.monotonic())
