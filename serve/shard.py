"""A replica that owns one shard of an index: searches it, and makes changes durable. No torch, so it is back in seconds.

It opens whichever version it is asked for, so that all shards of a search are of one version, and those who began with the old
one finish with it. Refusals are returned, not raised: Ray logs what is raised.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import faiss
import numpy as np
import ray
from prometheus_client import Counter, Gauge, Histogram
from ray import serve as ray_serve
from ray.serve.handle import DeploymentHandle

from raysys.runtime.sentences import UserError
from raysys.systems.rabtriever.index import F32
from raysys.systems.rabtriever.live import Found, LiveShard
from serve.collection import told
from serve.compaction import Compact, Compaction
from serve.meters import LATENCIES_S, Meters, Snapshot
from serve.refusal import Refused

OWNER_WAIT_S = 60.0
"""For a replica before this one that is still being killed."""
WRITERS = 32
"""Changes that may wait for one flush, and share it."""


class ShardMeters(Meters):
    """Metrics of a shard."""

    def __init__(self) -> None:
        super().__init__()
        own = self.registry
        self.queries = Counter("raysys_shard_queries", "Queries searched for.", registry=own)
        self.seconds = Histogram("raysys_shard_search_seconds", "Time of a search.", buckets=LATENCIES_S, registry=own)
        self.documents = Gauge("raysys_shard_documents", "Documents in the last version searched.", registry=own)
        self.changed = Gauge("raysys_shard_changed", "Documents of it that are in memory only.", registry=own)
        self.flushes = Gauge("raysys_shard_flushes", "Times that the journal was flushed.", registry=own)
        self.changes = Counter("raysys_shard_changes", "Changes acknowledged.", registry=own)


class Shard:
    """One shard, of which there is one replica; shard 0 is given the `others`, and makes compacted versions with them."""

    def __init__(self, index: str, shard: int, ef: int, others: Sequence[DeploymentHandle] = ()) -> None:
        faiss.omp_set_num_threads(max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1))))
        self.shard, self.ef, self.meters = LiveShard(index, shard, OWNER_WAIT_S), ef, ShardMeters()
        calls: list[Compact] = [lambda *names, other=other: told(other.compact.remote(*names)) for other in others]
        self.compactions = Compaction(self.shard.root, [self.compact, *calls]) if shard == 0 else None
        self.served: str | None = None
        self.searcher = ThreadPoolExecutor(1, "search")
        self.writers = ThreadPoolExecutor(WRITERS, "write")

    def check_health(self) -> None:
        """Raise where the journal takes nothing more: the replica is replaced, and opens it again."""
        if self.shard.journal.failed:
            raise OSError(self.shard.journal.failed)

    async def prepare(self, version: str) -> Refused | None:
        """Open a version beside the one that is served."""
        try:
            await asyncio.to_thread(self.shard.version, version)
        except UserError as error:
            return Refused(409, str(error))
        return None

    async def search(self, version: str, u: F32, k: int) -> Found | Refused:
        """The best documents of each query; u (n, d)."""
        return await asyncio.get_running_loop().run_in_executor(self.searcher, self._search, version, u, k)

    def _search(self, version: str, u: F32, k: int) -> Found | Refused:
        began = time.perf_counter()
        try:
            found = self.shard.version(version).view.search(u, k, self.ef)
        except UserError as error:
            return Refused(503, str(error))
        self.served = version
        self.meters.queries.inc(len(u))
        self.meters.seconds.observe(time.perf_counter() - began)
        return found

    async def put(self, ids: Sequence[str], texts: Sequence[str], vectors: F32) -> Refused | None:
        """Add documents; they are durable and found when this returns None."""
        return await self._write(self.shard.put, ids, texts, vectors)

    async def delete(self, version: str, id: str) -> Refused | None:
        """Delete a document."""
        if await self.text(version, id) is None:
            return Refused(404, f"id: got {id!r}; there is no document of that id")
        return await self._write(self.shard.delete, [id])

    async def _write(self, change: Any, *args: Any) -> Refused | None:
        try:
            await asyncio.get_running_loop().run_in_executor(self.writers, change, *args)
        except OSError as error:
            return Refused(
                503, f"journal: the change could not be written ({error.strerror or error}); send it again later"
            )
        self.meters.changes.inc()
        return None

    async def text(self, version: str, id: str) -> str | Refused | None:
        """A document's text, or None."""
        try:
            return (await asyncio.to_thread(self.shard.version, version)).text(id)
        except UserError as error:
            return Refused(503, str(error))

    async def facts(self, version: str) -> tuple[int, int, str] | Refused:
        """Documents, how many of them are in memory only, and the kind of index."""
        try:
            view = (await asyncio.to_thread(self.shard.version, version)).view
        except UserError as error:
            return Refused(503, str(error))
        return len(view), int(np.count_nonzero(~view.tail_dead)), view.base.kind

    async def compact(self, version: str, source: str) -> int | Refused:
        """Write this shard of a new version; how many documents it has."""
        try:
            return await asyncio.to_thread(self.shard.compact, version, source)
        except (UserError, OSError) as error:
            return Refused(503, str(error))

    async def begin_compaction(self) -> str | Refused:
        """Of shard 0: begin to make a version of all shards, and give its name."""
        assert self.compactions is not None
        return self.compactions.begin()

    async def compaction(self) -> tuple[str | None, str]:
        """Of shard 0: the version that is being made, and why the last one was not."""
        assert self.compactions is not None
        return self.compactions.making, self.compactions.problem

    async def snapshot(self) -> tuple[str, Snapshot]:
        """This replica's name and metrics."""
        told = await self.facts(self.served) if self.served else None
        if isinstance(told, tuple):
            self.meters.documents.set(told[0])
            self.meters.changed.set(told[1])
        self.meters.flushes.set(self.shard.journal.flushes)
        return ray_serve.get_replica_context().replica_tag, self.meters.snapshot()
