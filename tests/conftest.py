"""Fixtures that several test folders share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

for threads in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(threads, "1")  # Ray's workers inherit them
os.environ.setdefault("WANDB_MODE", "disabled")  # the tests of the tracker turn it on for themselves
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Any]:
    """One Ray for the whole session: a head with 4 logical CPUs, to which a test may add nodes that it may also remove."""
    import ray
    from ray.cluster_utils import Cluster

    from raysys.runtime.session import SINGLE_THREADED, environment_of

    with environment_of(SINGLE_THREADED):
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False})
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of shared data sets: RAYSYS_DATA, or ../shared/data beside the repository."""
    asked = os.environ.get("RAYSYS_DATA")
    folder = Path(asked) if asked else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the shared data folder (RAYSYS_DATA, or {folder})")
    return folder
