"""Compactions: one at a time whichever front is asked, and nothing is left of one that failed."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from searched import corpus, make_index

from raysys.systems.rabtriever.live import LiveShard
from raysys.systems.rabtriever.versions import Root
from serve.collection import Collection
from serve.compaction import Compaction
from serve.refusal import Refused


class Handle:
    """A shard as fronts see it."""

    def __init__(self, shard: Any) -> None:
        self.shard = shard

    def __getattr__(self, name: str) -> Any:
        class Method:
            @staticmethod
            def remote(*args: Any) -> Any:
                return getattr(self.shard, name)(*args)

        return Method


class Part:
    """A shard in this process; one that `fails` writes half of a version."""

    def __init__(self, root: Path, number: int) -> None:
        self.live, self.fails, self.go = LiveShard(root, number), False, asyncio.Event()
        self.compactions: Compaction | None = None

    async def compact(self, version: str, source: str) -> int | Refused:
        await self.go.wait()
        size = await asyncio.to_thread(self.live.compact, version, source)
        return Refused(503, "the disk is full") if self.fails else size

    async def facts(self, version: str) -> tuple[int, int, str]:
        return len(self.live.version(version).view), 0, "flat"

    async def begin_compaction(self) -> str | Refused:
        assert self.compactions is not None
        return self.compactions.begin()

    async def compaction(self) -> tuple[str | None, str]:
        assert self.compactions is not None
        return self.compactions.making, self.compactions.problem

    async def prepare(self, version: str) -> None:
        self.live.version(version)


async def done(front: Collection) -> Any:
    while (told := await front.index()).compacting:
        await asyncio.sleep(0.01)
    return told


def test_all_fronts_tell_the_same_of_a_compaction_and_a_failed_one_leaves_nothing(tmp_path: Path) -> None:
    async def ask() -> None:
        root = Root.open(make_index(tmp_path / "i", corpus(40), shards=2))
        parts = [Part(root.folder, s) for s in range(2)]
        parts[0].compactions = Compaction(root, [part.compact for part in parts])
        one, two = (Collection(root, [Handle(part) for part in parts], 5.0, 5.0) for _ in range(2))  # type: ignore[misc]

        first = (await one.compact()).version
        assert [(await front.index()).compacting for front in (one, two)] == [first, first]
        with pytest.raises(Refused, match=f"{first} is being made") as told:
            await two.compact()
        assert told.value.status == 409
        for part in parts:
            part.go.set()
        assert (await done(two)).problem is None
        for front in (one, two):
            await front.reload()
            assert (await front.index()).version == first

        parts[1].fails = True
        second = (await two.compact()).version
        for front in (one, two):
            assert (await done(front)).problem == f"{second} could not be made: the disk is full"
        assert list((root.folder / "building").iterdir()) == []
        assert root.current() == first
        parts[1].fails = False
        await one.compact()
        assert (await done(two)).problem is None
        for part in parts:
            part.live.close()

    asyncio.run(ask())


def test_what_a_killed_compaction_left_is_removed_and_a_build_is_not(tmp_path: Path) -> None:
    root = Root.open(make_index(tmp_path, corpus(10), shards=1))
    for name in ("compact-killed", "compact-by-hand", "v9"):
        (root.folder / "building" / name / "shard-000").mkdir(parents=True)
    (root.folder / "building" / "compact-by-hand" / "build.json").write_text("{}")
    assert Compaction(root, []).problem == "compact-killed was not finished: shard 0 was replaced meanwhile"
    assert sorted(path.name for path in (root.folder / "building").iterdir()) == ["compact-by-hand", "v9"]
