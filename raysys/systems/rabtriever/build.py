"""Index versions made from chunks of documents, in any order, by one process or many, resumed after a kill.

    builder = Builder(root, version, width, fingerprint, shards=2, kind="flat")
    for i, (ids, texts) in enumerate(parts):
        if not builder.has(i):                       # what a killed process had done
            builder.put(i, ids, texts, vectors(texts))
    builder.finish()                                 # root/versions/<version>, whole or not at all
    publish(root, version)                           # versions.py: the app goes over to it

Notable choices
- A chunk is a file per shard, written under another name, flushed and renamed, with a SHA-256 in front: it is whole or not
  there. `finish` writes the index files, the manifests last, and renames the folder into place.
- `build.json` is written first: chunks of other documents, or cut otherwise, never get into a version.
- Documents are dealt to shards by a hash of their id (`shard_of`), so that later changes of one find it.
- The same chunks give the same bytes, however often the build was interrupted; a graph only with threads=1.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from raysys.runtime.sentences import UserError
from raysys.runtime.storage import Storage, flush_folder
from raysys.systems.rabtriever.chunks import Chunk, read_chunk, whole, write_chunk
from raysys.systems.rabtriever.index import F32, Kind
from raysys.systems.rabtriever.journal import segments
from raysys.systems.rabtriever.manifest import FORMAT, GRAPH, MANIFEST, id_hash, joined, sha256
from raysys.systems.rabtriever.versions import Root, shard_folder, shard_of

BUILD = "build.json"
NEIGHBOURS, EF_BUILD = 32, 200
"""Of the graph: links per document and layer, and candidates looked at while linking."""


def digest_of(parts: Iterable[Any]) -> str:
    """SHA-256 of values that JSON can write, one after the other."""
    told = hashlib.sha256()
    for part in parts:
        told.update(json.dumps(part).encode() + b"\n")
    return told.hexdigest()


class Builder:
    """Makes one version of an index root.

    Args:
        root: folder of all versions; made if it is not there.
        version: name of the version.
        width, fingerprint, shards: as those of the root, which keeps them for life; shards None means the root's, or 1.
        kind: `flat` or `hnsw`.
        source: digest of the documents and how they are cut (`digest_of`); chunks of another one are refused.
        again: a version of the same digest may be there; then `done` is true, and there is nothing to put or finish.

    Raises:
        UserError: a value is not allowed, the version exists, a build of it has another digest, or the root has another width,
            fingerprint or number of shards.
    """

    def __init__(
        self,
        root: str | Path,
        version: str,
        width: int,
        fingerprint: str,
        shards: int | None = None,
        kind: Kind = "flat",
        source: str = "",
        again: bool = False,
    ) -> None:
        if kind not in ("flat", "hnsw"):
            raise UserError(f"kind: got {kind!r}; expected flat or hnsw")
        self.root = Root.make(root, width, fingerprint, shards)
        self.target = self.root.version_folder(version)
        self.kind, self.version = kind, version
        self.digest = digest_of([source, fingerprint, kind, width, self.root.shards])
        self.folder = self.root.folder / "building" / version
        self.done = self.target.exists()
        if self.done and not (again and self.root.check(version).get("digest") == self.digest):
            raise UserError(f"version: got {version!r}; {self.root.folder} has one of that name, choose another")
        if not self.done:
            self._begin()

    def _begin(self) -> None:
        """Note what is built, before anything of it is there."""
        path = self.folder / BUILD
        if not path.exists() and not any(self.folder.rglob("chunk-*")):
            Storage(self.folder).write_bytes(BUILD, json.dumps({"digest": self.digest}).encode())
        try:
            same = json.loads(path.read_bytes())["digest"] == self.digest
        except (OSError, ValueError, KeyError, TypeError):
            same = False
        if not same:
            raise UserError(
                f"version: got {self.version!r}; {self.folder} holds a build of other documents, chunks, model or kind, delete it"
                " or choose another name"
            )

    def _files(self, chunk: int) -> list[Path]:
        return [self.folder / shard_folder(s) / f"chunk-{chunk:08d}" for s in range(self.root.shards)]

    def has(self, chunk: int) -> bool:
        """Whether a chunk is there, whole, in every shard."""
        return all(path.is_file() and whole(path) for path in self._files(chunk))

    def put(self, chunk: int, ids: Sequence[str], texts: Sequence[str], vectors: F32) -> None:
        """Write chunk number `chunk`, over one that may be there; durable when it returns.

        Raises:
            UserError: lengths, shape or dtype do not fit, an id is empty, or a number is not finite.
        """
        d = self.root.width
        if len(ids) != len(texts) or vectors.shape != (len(ids), d) or vectors.dtype != np.float32:
            raise UserError(
                f"documents: got {len(ids)} ids, {len(texts)} texts and {vectors.dtype} vectors {vectors.shape}; expected as"
                f" many of each, float32 and {d} wide"
            )
        if not np.isfinite(vectors).all() or not all(ids):
            raise UserError(
                f"documents: chunk {chunk} has an empty id or a vector that is not finite; neither is allowed"
            )
        shard = np.array([shard_of(id, self.root.shards) for id in ids], np.int64)
        for s, path in enumerate(self._files(chunk)):
            rows = np.flatnonzero(shard == s).tolist()
            write_chunk(path, Chunk([ids[i] for i in rows], [texts[i] for i in rows], vectors[rows]))

    def finish(self, threads: int = 1) -> Path:
        """Make the version of all chunks, which must be numbered from 0 without a gap.

        Args:
            threads: for the graph. With more than one its bytes, not its quality, differ from build to build.

        All changes whose journal is still there stay on top of the version.

        Raises:
            UserError: a chunk is missing or damaged, or an id is there twice.
        """
        made: list[dict[str, Any]] = []
        for s in range(self.root.shards):
            folder = self.folder / shard_folder(s)
            folder.mkdir(parents=True, exist_ok=True)
            names = sorted(path.name for path in folder.glob("chunk-*"))
            if names != [f"chunk-{i:08d}" for i in range(len(names))]:
                raise UserError(f"index: of {folder} the chunks {names[:3]} ... have a gap; put the missing ones")
            parts = _Parts(folder, len(names), self.root.width)
            first = min(segments(self.root.journal_folder(s)), default=0)
            made.append(write_index(folder, parts, self.root.width, self.root.fingerprint, self.kind, threads, first))
        for s in range(self.root.shards):
            for path in (self.folder / shard_folder(s)).glob("chunk-*"):
                path.unlink()
        told = {"format": FORMAT, "shards": self.root.shards, "kind": self.kind, "digest": self.digest}
        total = told | {"m": sum(one["m"] for one in made)}
        return self.root.settle(self.folder, self.version, total)


class _Parts:
    """The chunks of a shard, read one at a time, as often as needed."""

    def __init__(self, folder: Path, count: int, width: int) -> None:
        self.folder, self.count, self.width = folder, count, width

    def __iter__(self) -> Iterator[Chunk]:
        for i in range(self.count):
            yield read_chunk(self.folder / f"chunk-{i:08d}", self.width)


def write_index(
    folder: Path, parts: Any, width: int, fingerprint: str, kind: Kind, threads: int = 1, journal: int = 0
) -> dict[str, Any]:
    """Write the files of `VectorIndex` into a folder, the manifest last; returns the manifest.

    Args:
        parts: gives chunks each time it is iterated over.

    Raises:
        UserError: an id is there twice.
    """
    sizes = [(len(part.ids), float(np.linalg.norm(part.vectors, axis=1).max(initial=0.0))) for part in parts]
    m, largest = sum(size for size, _ in sizes), max((norm for _, norm in sizes), default=0.0)
    hashes, offsets = np.empty(m, np.int64), {name: [np.zeros(1, np.int64)] for name in ("ids", "texts")}
    at, ends = 0, {"ids": 0, "texts": 0}
    with (
        open(folder / "vectors.npy", "wb") as vectors,
        open(folder / "ids.bin", "wb") as ids,
        open(folder / "texts.bin", "wb") as texts,
    ):
        header = {"descr": "<f4", "fortran_order": False, "shape": (m, width)}
        np.lib.format.write_array_header_1_0(vectors, header)
        for part in parts:
            vectors.write(np.ascontiguousarray(part.vectors, "<f4").data)
            for name, file, strings in (("ids", ids, part.ids), ("texts", texts, part.texts)):
                ends_here, blob = joined(strings)
                file.write(blob)
                offsets[name].append(ends_here[1:] + ends[name])
                ends[name] += len(blob)
            hashes[at : at + len(part.ids)] = [id_hash(id) for id in part.ids]
            at += len(part.ids)
    for name, found in offsets.items():
        np.save(folder / f"{name}.npy", np.concatenate(found))
    order = np.argsort(hashes, kind="stable")
    np.save(folder / "lookup.npy", np.stack([hashes[order], order]))
    _refuse_twins(folder, hashes[order], order)
    names = ["vectors.npy", "ids.bin", "ids.npy", "texts.bin", "texts.npy", "lookup.npy"]
    if kind == "hnsw" and m:
        _write_graph(folder, m, width, threads)
        names.append(GRAPH)
    for name in names:
        flush_folder(folder / name)  # a file as well
    manifest: dict[str, Any] = {
        "format": FORMAT, "kind": kind, "m": m, "d": width, "fingerprint": fingerprint, "largest_norm": largest,
        "journal": journal, "files": {name: [(folder / name).stat().st_size, sha256(folder / name)] for name in names},
    }  # fmt: skip
    Storage(folder).write_bytes(MANIFEST, json.dumps(manifest, indent=1).encode())
    return manifest


def _refuse_twins(folder: Path, hashes: NDArray[np.int64], order: NDArray[np.int64]) -> None:
    """Raise UserError where an id is there twice: equal ids have equal hashes, which are in order."""
    offsets, blob = np.load(folder / "ids.npy"), (folder / "ids.bin").read_bytes()
    same = np.flatnonzero(np.diff(hashes) == 0)
    for run in np.split(same, np.flatnonzero(np.diff(same) != 1) + 1) if len(same) else []:
        places = order[run[0] : run[-1] + 2]
        ids = [blob[offsets[p] : offsets[p + 1]] for p in places]
        if len(set(ids)) < len(ids):
            twin = next(one for one in ids if ids.count(one) > 1).decode()
            raise UserError(f"documents: the id {twin!r} is there twice; expected every id once")


def _write_graph(folder: Path, m: int, width: int, threads: int) -> None:
    """HNSW by inner product over vectors.npy."""
    graph, vectors = (
        faiss.IndexHNSWFlat(width, NEIGHBOURS, faiss.METRIC_INNER_PRODUCT),
        np.load(folder / "vectors.npy", mmap_mode="r"),
    )
    graph.hnsw.efConstruction = EF_BUILD
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(threads)
    try:
        for start in range(0, m, 65_536):
            graph.add(np.array(vectors[start : start + 65_536]))
    finally:
        faiss.omp_set_num_threads(before)
    faiss.write_index(graph, str(folder / GRAPH))


def remove_build(root: str | Path, version: str) -> None:
    """Forget a build that was not finished."""
    folder = Root.open(root).version_folder(version, "building")
    if folder.exists():
        shutil.rmtree(folder, ignore_errors=True)
        flush_folder(folder.parent)
