"""What the front knows of an index whose shards are replicas of their own: which version is served, and where a document is.

Notable choices
- All shards or none: a shard that is away makes a search fail with 503; a part of the results is never passed off as all.
- Going over to another version: every shard opens it beside the old one, then searches name the new one. Searches under way
  have named the old one and finish with it; shards keep both. Each front goes over by itself.
- Compaction is shard 0's (serve/compaction.py), so that all fronts tell the same of it.
- A change is sent to the shard that owns the id; versions do not matter to it (raysys/systems/rabtriever/live.py).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponse

from raysys.runtime.sentences import UserError
from raysys.systems.rabtriever.index import F32
from raysys.systems.rabtriever.live import Found
from raysys.systems.rabtriever.versions import Root, shard_of
from serve.compaction import sentence
from serve.refusal import Refused
from serve.search_models import Index, Started

log = logging.getLogger("ray.serve")


class Hits(NamedTuple):
    """What was found for a query, best first."""

    version: str
    scores: list[float]
    ids: list[str]
    texts: list[str]


class Collection:
    """The shards of an index.

    Args:
        shards: handles, one per shard.
        timeout_s: a shard that does not answer a search or a change by then is away.
        reload_s: how often `watch` looks for a published version.

    Raises:
        UserError: CURRENT names no whole version of this root.
    """

    def __init__(self, root: Root, shards: Sequence[DeploymentHandle], timeout_s: float, reload_s: float) -> None:
        self.root, self.shards, self.timeout_s, self.reload_s = root, shards, timeout_s, reload_s
        self.version = root.current()
        root.check(self.version)
        self._refused = ""
        self._watcher: asyncio.Task[None] | None = None
        self._reloading = asyncio.Lock()

    async def search(self, u: F32, k: Sequence[int]) -> list[Hits]:
        """The best k[i] documents of query i, by inner product; u (n, d)."""
        version = self.version
        parts: list[Found] = await self._ask("search", version, u, max(k))
        return [merge(version, parts, i, most) for i, most in enumerate(k)]

    async def put(self, ids: Sequence[str], texts: Sequence[str], z: F32) -> None:
        """Make documents durable in their shards; z (n, d). Some of them may be where this raises."""
        owners, calls = np.array([shard_of(id, self.root.shards) for id in ids]), []
        for s in np.unique(owners).tolist():
            rows = np.flatnonzero(owners == s).tolist()
            asked = self.shards[s].put.remote([ids[i] for i in rows], [texts[i] for i in rows], z[rows])
            calls.append(self._in_time(asked, s))
        await asyncio.gather(*calls)

    async def text(self, id: str) -> str:
        """A document's text.

        Raises:
            Refused: 404 where there is none.
        """
        text: str | None = await self._of(id, "text")
        if text is None:
            raise Refused(404, f"id: got {id!r}; there is no document of that id")
        return text

    async def delete(self, id: str) -> None:
        """Delete a document.

        Raises:
            Refused: 404 where there is none.
        """
        await self._of(id, "delete")

    # ------------------------------------------------------------ versions

    def watch(self) -> None:
        """See to it that published versions are looked for. To be called from the loop, as often as one likes."""
        if self._watcher is None or self._watcher.done():
            self._watcher = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self.reload_s)
            try:
                await self.reload()
            except (Refused, RayError, RayServeException) as wrong:
                if (told := sentence(wrong)) != self._refused:
                    log.warning("the published version is not served: %s", told)
                self._refused = told

    async def reload(self) -> None:
        """Go over to the version that CURRENT names, once every shard has opened it; the old one goes on if one cannot.

        Raises:
            Refused: it is not there, not whole, or of another fingerprint.
        """
        async with self._reloading:
            try:
                name = await asyncio.to_thread(self.root.current)
                if name != self.version:
                    await asyncio.to_thread(self.root.check, name)
            except UserError as error:
                raise Refused(409, str(error)) from error
            if name != self.version:
                await asyncio.gather(*(told(shard.prepare.remote(name)) for shard in self.shards))
                self.version = name
            self._refused = ""

    async def compact(self) -> Started:
        """Begin to make a version that holds all changes.

        Raises:
            Refused: 409 where one is being made, whichever front was asked.
        """
        return Started(version=await self._in_time(self.shards[0].begin_compaction.remote(), 0))

    async def index(self) -> Index:
        """What is searched."""
        facts = await self.all_shards("facts")
        making, problem = await self._in_time(self.shards[0].compaction.remote(), 0)
        return Index(
            version=self.version, kind=facts[0][2], shards=self.root.shards, documents=sum(one[0] for one in facts),
            changed=sum(one[1] for one in facts), fingerprint=self.root.fingerprint, compacting=making,
            problem=self._refused or problem or None,
        )  # fmt: skip

    # ------------------------------------------------------------ calls

    async def all_shards(self, method: str) -> list[Any]:
        """Every shard's answer about the version that is served."""
        return await self._ask(method, self.version)

    async def _ask(self, method: str, *args: Any) -> list[Any]:
        calls = [getattr(shard, method).remote(*args) for shard in self.shards]
        return list(await asyncio.gather(*(self._in_time(call, s) for s, call in enumerate(calls))))

    async def _of(self, id: str, method: str) -> Any:
        s = shard_of(id, self.root.shards)
        return await self._in_time(getattr(self.shards[s], method).remote(self.version, id), s)

    async def _in_time(self, asked: DeploymentResponse, shard: int) -> Any:
        try:
            async with asyncio.timeout(self.timeout_s):
                return await told(asked)
        except TimeoutError as error:
            raise Refused(503, f"index: shard {shard} is away; ask again later") from error


async def told(asked: DeploymentResponse) -> Any:
    """What a replica answers; a refusal is raised, and whoever gives up takes the question back."""
    try:
        answer = await asked
    except asyncio.CancelledError:
        asked.cancel()
        raise
    if isinstance(answer, Refused):
        raise answer
    return answer


def merge(version: str, parts: Sequence[Found], i: int, k: int) -> Hits:
    """The best k of all shards for query i. Equal scores go by shard, then as the shard has them, whatever k is."""
    rows = [(-score, s, r) for s, part in enumerate(parts) for r, score in enumerate(part.scores[i].tolist())]
    rows = sorted(rows)[:k]
    ids, texts = [parts[s].ids[i][r] for _, s, r in rows], [parts[s].texts[i][r] for _, s, r in rows]
    return Hits(version, [-negative for negative, _, _ in rows], ids, texts)
