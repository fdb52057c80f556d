"""Making a version that holds all changes, of all shards together.

Shard0 owns it, of which there is one: whichever front is asked, one is made at a time, and all of them can tell how it goes.
What could not be finished leaves nothing behind. Fronts go over to the version as to any other that is published.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime

from raysys.systems.rabtriever.build import BUILD, remove_build
from raysys.systems.rabtriever.live import settle
from raysys.systems.rabtriever.versions import Root
from serve.refusal import Refused

log = logging.getLogger("ray.serve")
PREFIX = "compact-"
Compact = Callable[[str, str], Awaitable[int | Refused]]
"""Writes a shard of the version (new, source), and gives how many documents it has."""


class Compaction:
    """One at a time.

    Args:
        shards: how each of them is compacted, in order.
    """

    def __init__(self, root: Root, shards: Sequence[Compact]) -> None:
        self.root, self.shards = root, shards
        self.making: str | None = None
        self.problem = ""
        self._task: asyncio.Task[None] | None = None
        for folder in (root.folder / "building").glob(f"{PREFIX}*"):
            if not (folder / BUILD).exists():  # which a build from documents has, whatever its name
                remove_build(root.folder, folder.name)
                self.problem = f"{folder.name} was not finished: shard 0 was replaced meanwhile"

    def begin(self) -> str | Refused:
        """Begin, and give the name of the new version."""
        if self.making is not None:
            return Refused(409, f"index: {self.making} is being made; ask again when it is done")
        self.making, self.problem = f"{PREFIX}{datetime.now(UTC):%Y%m%d-%H%M%S-%f}", ""
        self._task = asyncio.create_task(self._make(self.making))
        return self.making

    async def _make(self, name: str) -> None:
        try:
            source = await asyncio.to_thread(self.root.current)
            made = await asyncio.gather(*(shard(name, source) for shard in self.shards), return_exceptions=True)
            sizes = [one for one in made if isinstance(one, int)]
            for wrong in made:
                if isinstance(wrong, BaseException):  # a Refused as well
                    raise wrong
            await asyncio.to_thread(settle, self.root, name, source, sizes)
        except Exception as wrong:  # noqa: BLE001 (GET /index tells it, on every front)
            self.problem = f"{name} could not be made: {sentence(wrong)}"
            log.warning(self.problem)
            await asyncio.to_thread(remove_build, self.root.folder, name)
        finally:
            self.making = None


def sentence(wrong: Exception) -> str:
    """What went wrong, on one line."""
    return " ".join((wrong.sentence if isinstance(wrong, Refused) else str(wrong)).split())
