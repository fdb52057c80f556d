"""What the fronts of all apps share: the fields of their configuration, and the metrics of all replicas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress

from ray import serve as ray_serve
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from raysys.runtime.config import Config
from serve.guard import GuardConfig
from serve.meters import FrontMeters, Snapshot

COLLECT_TIMEOUT_S = 5.0


class AppConfig(Config):
    """What every app is told."""

    run: str | None = None
    """Run folder (path or URI) whose model is served."""
    guard: GuardConfig = GuardConfig()


class Collects:
    """A front replica that gives the metrics of its app.

    Args:
        behind: the deployments behind it, each with a `snapshot` of its own.
    """

    def __init__(self, behind: Sequence[DeploymentHandle]) -> None:
        context = ray_serve.get_replica_context()
        self.meters = FrontMeters()
        self.counted = [ray_serve.get_deployment_handle(context.deployment, context.app_name), *behind]

    async def snapshot(self) -> tuple[str, Snapshot]:
        """This replica's name and metrics."""
        return ray_serve.get_replica_context().replica_tag, self.meters.snapshot()

    async def snapshots(self) -> Mapping[str, Snapshot]:
        """The metrics of all replicas that answer in time."""
        collected: dict[str, Snapshot] = dict([await self.snapshot()])
        for handle in self.counted:
            with suppress(TimeoutError, RayServeException):  # what is away has nothing to tell
                asked = handle.broadcast("snapshot")
                got = await asked.results_async(timeout_s=COLLECT_TIMEOUT_S, return_exceptions=True)
                collected |= dict(one for one in got if not isinstance(one, BaseException))
        return collected
