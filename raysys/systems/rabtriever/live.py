"""One shard of an index with the changes since: searched while it is changed, compacted while it is searched.

Shapes: n queries or documents, d width, k results.

Notable choices
- A search sees one `View`, which never changes: the mapped base, which of it is dead, and the rows of the tail it knows. A
  change makes a new view; nobody waits for anybody, and no document is missing while it is replaced.
- A put document goes to the end of the tail, and the old one of its id is dead. Compaction keeps that order, so ties stay as
  they were.
- Several versions can be open at once; a change is applied to all of them, so that going over to another one loses none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from raysys.runtime.sentences import UserError
from raysys.systems.rabtriever.build import write_index
from raysys.systems.rabtriever.chunks import Chunk
from raysys.systems.rabtriever.index import EF, F32, Tail, VectorIndex, best
from raysys.systems.rabtriever.journal import Change, Journal, segments
from raysys.systems.rabtriever.manifest import FORMAT
from raysys.systems.rabtriever.versions import Root, publish, shard_folder

OPEN_VERSIONS = 2
PART = 16_384
Bools = NDArray[np.bool_]


class Found(NamedTuple):
    """Results of each query: scores (n, k) descending, ids and texts of the same shape."""

    scores: F32
    ids: list[list[str]]
    texts: list[list[str]]


@dataclass(frozen=True)
class View:
    """What a search sees. `ids` and `texts` may grow after it was made; its own rows are the first of them."""

    base: VectorIndex
    base_dead: Bools
    tail: Tail
    tail_dead: Bools
    ids: list[str]
    texts: list[str]

    def __len__(self) -> int:
        return int((~self.base_dead).sum() + (~self.tail_dead).sum())

    def search(self, u: F32, k: int, ef: int = EF) -> Found:
        """The best documents of each query; u (n, d) float32. Equal scores: the base before the tail, each by position."""
        dead = self.base_dead if self.base_dead.any() else None
        scores, positions = best(self.base, u, k, dead, ef)
        if self.tail.size:
            more, rows = best(self.tail, u, k, self.tail_dead if self.tail_dead.any() else None)
            scores, positions = np.concatenate([scores, more], 1), np.concatenate([positions, rows + self.base.size], 1)
            order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
            scores, positions = np.take_along_axis(scores, order, 1), np.take_along_axis(positions, order, 1)
        ids = [[self.id(int(p)) for p in row] for row in positions]
        return Found(scores, ids, [[self.text(int(p)) for p in row] for row in positions])

    def id(self, position: int) -> str:
        """Of a document by its position, the tail's after the base's."""
        return self.base.id(position) if position < self.base.size else self.ids[position - self.base.size]

    def text(self, position: int) -> str:
        """Of a document by its position, the tail's after the base's."""
        return self.base.text(position) if position < self.base.size else self.texts[position - self.base.size]

    def __iter__(self) -> Iterator[Chunk]:
        """The living documents in order, some at a time."""
        alive = [np.flatnonzero(~self.base_dead), np.flatnonzero(~self.tail_dead)]
        for rows, vectors, start in ((alive[0], self.base.vectors, 0), (alive[1], self.tail.vectors, self.base.size)):
            for at in range(0, len(rows), PART):
                some = rows[at : at + PART]
                places = [int(p) + start for p in some]
                yield Chunk([self.id(p) for p in places], [self.text(p) for p in places], vectors[some])


class Live:
    """A version of a shard and the changes since. `apply` is for one thread at a time; all else for any."""

    def __init__(self, base: VectorIndex) -> None:
        nothing = np.zeros(0, np.bool_)
        self._store = np.zeros((0, base.width), np.float32)
        self._where: dict[str, int] = {}
        self.view = View(base, np.zeros(base.size, np.bool_), Tail(self._store, 0.0), nothing, [], [])

    def apply(self, changes: Sequence[Change]) -> None:
        """Make a view with these changes, in order."""
        view, more = self.view, sum(len(change.ids) for change in changes if change.texts is not None)
        base_dead, count, largest = view.base_dead.copy(), view.tail.size, view.tail.largest
        tail_dead = np.concatenate([view.tail_dead, np.zeros(more, np.bool_)])
        if count + more > len(self._store):
            store = np.zeros((max(64, 2 * (count + more)), view.base.width), np.float32)
            store[:count] = self._store[:count]
            self._store = store
        where: dict[str, int] = {}
        for change in changes:
            for i, id in enumerate(change.ids):
                row = where.get(id, self._where.get(id))
                if row is None and (position := view.base.where(id)) >= 0:
                    base_dead[position] = True
                elif row is not None and row >= 0:
                    tail_dead[row] = True
                where[id] = -1
                if change.texts is not None and change.vectors is not None:
                    self._store[count] = change.vectors[i]
                    view.ids.append(id)
                    view.texts.append(change.texts[i])
                    largest = max(largest, float(np.linalg.norm(change.vectors[i])))
                    where[id], count = count, count + 1
        self.view = replace(view, base_dead=base_dead, tail=Tail(self._store[:count], largest), tail_dead=tail_dead)
        self._where.update(where)

    def text(self, id: str) -> str | None:
        """The text of a document, or None."""
        row, view = self._where.get(id), self.view
        if row is None:
            position = view.base.where(id)
            return view.base.text(position) if position >= 0 else None
        return view.texts[row] if row >= 0 else None


class LiveShard:
    """A shard of a root, owned by this process: its journal, and the versions that are asked for.

    Args:
        wait_s: how long to wait for another process that owns it.

    Raises:
        UserError: another process owns it, or its journal is not whole.
    """

    def __init__(self, root: str | Path, shard: int, wait_s: float = 0.0) -> None:
        self.root, self.shard = Root.open(root), shard
        if not 0 <= shard < self.root.shards:
            raise UserError(f"shard: got {shard}; {self.root.folder} has {self.root.shards}, numbered from 0")
        self._open: dict[str, Live] = {}
        folder, first = self.root.journal_folder(shard), 0
        if not segments(folder):
            first = self.root.load(self.root.current(), shard).manifest["journal"]
        self.journal = Journal(folder, self.root.width, self.root.fingerprint, self._apply, first, wait_s)

    def _apply(self, changes: Sequence[Change]) -> None:
        for live in self._open.values():
            live.apply(changes)

    def version(self, name: str) -> Live:
        """A version with all changes since, opened if it is not open; the last OPEN_VERSIONS that were opened stay so.

        Raises:
            UserError: it is not there, not whole, of another fingerprint, or lacks a part of the journal.
        """
        if name in self._open:
            return self._open[name]
        base = self.root.load(name, self.shard)
        with self.journal.still:
            if name not in self._open:
                live = Live(base)
                live.apply(list(self.journal.read(base.manifest["journal"])))
                kept = list(self._open.items())[1 - OPEN_VERSIONS :]
                self._open = dict([*kept, (name, live)])
            return self._open[name]

    def put(self, ids: Sequence[str], texts: Sequence[str], vectors: F32) -> None:
        """Add documents, over those of the same ids; durable and found when it returns.

        Raises:
            ValueError: the vectors have another shape or are not finite.
            OSError: they could not be written.
        """
        vectors = np.ascontiguousarray(vectors, np.float32)
        if vectors.shape != (len(ids), self.root.width) or len(ids) != len(texts) or not np.isfinite(vectors).all():
            raise ValueError(f"vectors: got {vectors.shape}; expected finite numbers {(len(ids), self.root.width)}")
        self.journal.append(Change(tuple(ids), tuple(texts), vectors))

    def delete(self, ids: Sequence[str]) -> None:
        """Delete documents; durable when it returns. Nothing happens to those that are not there."""
        self.journal.append(Change(tuple(ids)))

    def compact(self, version: str, source: str, threads: int = 1) -> int:
        """Write this shard of a new version: `source` with all changes so far; how many documents it has.

        Changes made meanwhile go to a new segment of the journal, which the new version will be read with.

        Raises:
            UserError: the version is there already, or its name is not allowed.
        """
        if self.root.version_folder(version).exists():
            raise UserError(f"version: got {version!r}; {self.root.folder} has one of that name, choose another")
        folder = self.root.version_folder(version, "building") / shard_folder(self.shard)
        self.version(source)  # opened before anybody has to wait for it
        with self.journal.still:  # and asked for again: one that was closed meanwhile is not told of changes
            view, first = self.version(source).view, self.journal.rotate()
        folder.mkdir(parents=True, exist_ok=True)
        base = view.base
        return int(write_index(folder, view, base.width, base.fingerprint, base.kind, threads, first)["m"])

    def close(self) -> None:
        """Let another process own it."""
        self.journal.close()


def settle(root: Root, version: str, source: str, sizes: Sequence[int]) -> None:
    """Publish a version whose shards have all been compacted, to `sizes` documents each.

    Raises:
        UserError: another version than `source` was published meanwhile; it stays the one to serve.
    """
    told = {"format": FORMAT, "shards": root.shards, "kind": root.check(source)["kind"], "m": sum(sizes)}
    root.settle(root.version_folder(version, "building"), version, told)
    if (now := root.current()) != source:
        raise UserError(
            f"version: {now} was published while {version} was made of {source}; {now} stays, compact it again"
        )
    publish(root.folder, version)


def compact(root: str | Path, version: str, threads: int = 1) -> None:
    """Make and publish a version that holds all changes so far, while no app has the index.

    Raises:
        UserError: an app has it, or the index is not whole.
    """
    opened = Root.open(root)
    shards: list[LiveShard] = []
    try:
        shards += [LiveShard(root, s) for s in range(opened.shards)]
        source = opened.current()
        settle(opened, version, source, [shard.compact(version, source, threads) for shard in shards])
    finally:
        for shard in shards:
            shard.close()
