"""Maximum inner products over stored documents: a folder that is mapped into memory, searched exactly or by a graph.

Shapes: m documents, d width of a vector, n queries, k results, b bytes.

    vectors.npy            (m, d) float32, as they were given
    ids.bin, texts.bin     UTF-8, one after the other; offsets in ids.npy, texts.npy (m + 1,) int64
    lookup.npy             (2, m) int64: hashes of the ids in ascending order, and where each of them is
    graph.faiss            kind hnsw only
    manifest.json          format, kind, sizes, fingerprint, norms, SHA-256 of each file; written last

Notable choices
- numpy, faiss and hashlib only: a process that serves an index needs no torch and starts in a second. Nothing is unpickled.
- Scores are exact and depend on nothing but query and document: whatever finds the candidates, they are scored again in
  float64, since the float32 products of BLAS differ in the last bit with the number of queries. Equal scores go by position.
- A flat search is certified: more candidates are drawn until the lowest of them cannot reach the k-th result whatever its
  rounding, so that ties and deleted documents never push a result out. Where too many tie, one float64 product of all
  documents leaves a few to score.
- The graph of hnsw is linked by inner product itself. The usual reduction to distances, [z; sqrt(M^2 - |z|^2)] with M the largest
  norm [spec 6.1], was measured and is worse wherever norms differ or queries are unlike documents, as u(q) are: on 10,000
  clustered vectors of width 384 whose norms vary by a fifth, recall@10 is .33 to .80 with it and .98 to 1.00 without
  (32 links, ef 128; docs/retriever_serving.md). It is the better one only for equal norms.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import faiss
import numpy as np
from numpy.typing import NDArray

from raysys.systems.rabtriever.manifest import GRAPH, damaged, id_hash, read_manifest, refuse_other

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
Kind = Literal["flat", "hnsw"]
EF, SPARE = 512, 16
ROUNDING = 2.0**-17
"""Of |u| |z|: far more than a float32 product of a few thousand numbers is off by."""
TILE = 1 << 22
"""Numbers multiplied at once in float64."""
PRODUCT_ROUNDING, SUMS = 2.0**-40, 1 << 24
"""Of |u| |z|: far more than two float64 products of a few thousand numbers differ by. And how many of them are held at once."""
MATRIX_FROM = 6
"""Queries from which one matrix product is faster than one query after the other (measured on 100,000 x 384 and x 128)."""


class VectorIndex:
    """An index that lies in a folder and never changes.

    Args:
        folder: as `build.write_index` writes it.
        fingerprint: of the vectors that will be asked with; None accepts any.
        verify: compare every file with its SHA-256, which reads it once; sizes and shapes are always checked.

    Raises:
        UserError: the folder is no index, is not whole, or holds vectors of another fingerprint.
    """

    def __init__(self, folder: str | Path, fingerprint: str | None = None, verify: bool = True) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder, verify)
        self.kind: Kind = self.manifest["kind"]
        self.size, self.width = int(self.manifest["m"]), int(self.manifest["d"])
        self.fingerprint: str = self.manifest["fingerprint"]
        self.largest: float = self.manifest["largest_norm"]
        refuse_other(self.folder, self.fingerprint, fingerprint)
        self.vectors: F32 = self._array("vectors.npy", (self.size, self.width), np.float32)
        self._ids, self._texts = self._strings("ids"), self._strings("texts")
        self._lookup: I64 = self._array("lookup.npy", (2, self.size), np.int64)
        self._graph = self._read_graph() if self.kind == "hnsw" and self.size else None

    def __len__(self) -> int:
        return self.size

    def _array(self, name: str, shape: tuple[int, ...], dtype: Any) -> Any:
        try:
            mapped = np.load(self.folder / name, mmap_mode="r" if shape[-1] and shape[0] else None, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise damaged(self.folder, name, str(error)) from error
        if mapped.shape != shape or mapped.dtype != dtype:
            raise damaged(self.folder, name, f"{mapped.dtype} {mapped.shape}, expected {np.dtype(dtype)} {shape}")
        return mapped.view(np.ndarray)

    def _strings(self, name: str) -> tuple[I64, memoryview]:
        offsets = self._array(f"{name}.npy", (self.size + 1,), np.int64)
        path = self.folder / f"{name}.bin"
        if path.stat().st_size != int(offsets[-1]):
            raise damaged(self.folder, path.name, f"{path.stat().st_size} bytes, expected {int(offsets[-1])}")
        return offsets, np.memmap(path, np.uint8, "r").data if int(offsets[-1]) else memoryview(b"")

    def _read_graph(self) -> Any:
        try:
            graph = faiss.read_index(str(self.folder / GRAPH), faiss.IO_FLAG_MMAP_IFC)
        except RuntimeError as error:
            raise damaged(self.folder, GRAPH, str(error).splitlines()[0][:120]) from error
        if graph.ntotal != self.size or graph.d != self.width:
            raise damaged(self.folder, GRAPH, f"{graph.ntotal} x {graph.d}, expected {self.size} x {self.width}")
        return graph

    def id(self, position: int) -> str:
        """The id of a document."""
        return self._string(self._ids, position)

    def text(self, position: int) -> str:
        """The text of a document."""
        return self._string(self._texts, position)

    def _string(self, strings: tuple[I64, memoryview], position: int) -> str:
        offsets, blob = strings
        return blob[offsets[position] : offsets[position + 1]].tobytes().decode()

    def where(self, id: str) -> int:
        """The position of a document, or -1."""
        if not self.size:
            return -1
        key = id_hash(id)
        for at in range(int(np.searchsorted(self._lookup[0], key)), self.size):
            if self._lookup[0, at] != key:
                break
            if self.id(int(self._lookup[1, at])) == id:
                return int(self._lookup[1, at])
        return -1

    def candidates(self, u: F32, k: int, ef: int = EF) -> tuple[F32, I64]:
        """Scores and positions (n, k) of about the best k <= m documents; -1 where the graph found fewer."""
        if self._graph is None:
            return _flat(u, self.vectors, k)
        parameters = faiss.SearchParametersHNSW(efSearch=max(ef, k))  # type: ignore[attr-defined]
        _, positions = self._graph.search(u, k, params=parameters)
        return np.full(positions.shape, np.inf, np.float32), positions

    def search(self, u: F32, k: int, ef: int = EF) -> tuple[F32, list[list[str]]]:
        """The best min(k, m) documents of each query: scores <u, z> (n, k) in descending order, and their ids.

        Equal scores go by position. u (n, d) float32.

        Raises:
            ValueError: u has another width or is not finite, or k < 1.
        """
        scores, positions = best(self, u, k, None, ef)
        return scores, [[self.id(int(p)) for p in row] for row in positions]


def _flat(u: F32, vectors: F32, k: int) -> tuple[F32, I64]:
    # In numbers of the queries. faiss 1.15 ships 128,000, with which 32 queries of width 384 take four times as long.
    faiss.cvar.distance_compute_blas_threshold = MATRIX_FROM * u.shape[1]
    found: tuple[F32, I64] = faiss.knn(u, vectors, k, metric=faiss.METRIC_INNER_PRODUCT)
    return found


class Tail:
    """Documents in memory only, by position (m, d): what `best` needs of a segment."""

    kind: Kind = "flat"

    def __init__(self, vectors: F32, largest: float) -> None:
        self.vectors, self.largest = vectors, largest
        self.size, self.width = vectors.shape

    def candidates(self, u: F32, k: int, ef: int = EF) -> tuple[F32, I64]:
        """Scores and positions (n, k) of the best k <= m documents, up to rounding."""
        return _flat(u, self.vectors, k)


def best(
    segment: VectorIndex | Tail, u: F32, k: int, dead: NDArray[np.bool_] | None = None, ef: int = EF
) -> tuple[F32, I64]:
    """Exact scores (n, k) and positions of the best documents that are not dead (m,); k is cut to how many there are.

    A graph may miss documents; a flat segment may not. If a graph finds too few that live, every document is looked at.

    Raises:
        ValueError: u has another width or is not finite, or k < 1.
    """
    u = np.ascontiguousarray(u, dtype=np.float32)
    if u.ndim != 2 or u.shape[1] != segment.width:
        raise ValueError(f"queries: got shape {u.shape}; expected (n, {segment.width})")
    if k < 1 or not np.isfinite(u).all():
        raise ValueError(f"k: got {k}; expected at least 1" if k < 1 else "queries: hold numbers that are not finite")
    k = min(k, segment.size - (0 if dead is None else int(dead.sum())))
    scores, positions = np.empty((len(u), k), np.float32), np.empty((len(u), k), np.int64)
    slack = ROUNDING * segment.largest * np.linalg.norm(u, axis=1)
    left, draw = np.arange(len(u) if k else 0), min(k + SPARE, segment.size)
    while len(left) and draw < segment.size and draw <= 1024 + 4 * k:
        rough, found = segment.candidates(u[left], draw, ef)
        exact, found = _exact(u[left], segment.vectors, found, dead)
        sure = exact[:, k - 1] > (rough[:, -1] + slack[left] if segment.kind == "flat" else -np.inf)
        scores[left[sure]], positions[left[sure]] = exact[sure, :k], found[sure, :k]
        left, draw = left[~sure], min(16 * draw, segment.size)
    step = max(1, SUMS // max(1, segment.size))
    for rows in (left[start : start + step] for start in range(0, len(left), step)):
        scores[rows], positions[rows] = _of_all(segment, u[rows], k, dead)
    return scores, positions


def _of_all(segment: VectorIndex | Tail, u: F32, k: int, dead: NDArray[np.bool_] | None) -> tuple[F32, I64]:
    """Scores and positions (n, k) of the best of all documents, however many tie.

    One float64 product finds those that may be among them. Only these are scored as `products` does, and of those that are
    sure to have the k-th score no more than the first k.
    """
    sums, step = np.empty((len(u), segment.size)), max(1, TILE // segment.width)
    for start in range(0, segment.size, step):
        part = segment.vectors[start : start + step].astype(np.float64)
        sums[:, start : start + step] = u.astype(np.float64) @ part.T
    if dead is not None:
        sums[:, dead] = -np.inf
    scores, positions = np.empty((len(u), k), np.float32), np.empty((len(u), k), np.int64)
    for i, row in enumerate(sums):
        off = PRODUCT_ROUNDING * segment.largest * float(np.linalg.norm(u[i]))
        last = -np.partition(-row, k - 1)[k - 1]
        low, high = (row - off).astype(np.float32), (row + off).astype(np.float32)
        least, most = np.float32(last - off), np.float32(last + off)
        wanted = high >= least
        if least == most:
            wanted[np.flatnonzero((low == most) & (high == most))[k:]] = False
        exact, found = _exact(u[i : i + 1], segment.vectors, np.flatnonzero(wanted)[None], None)
        scores[i], positions[i] = exact[0, :k], found[0, :k]
    return scores, positions


def _exact(u: F32, vectors: F32, found: I64, dead: NDArray[np.bool_] | None) -> tuple[F32, I64]:
    """Scores and positions (n, p) in their final order; -inf for none (-1) and for dead ones, which come last."""
    exact = np.where(found < 0, -np.inf, products(u, vectors, found)).astype(np.float32)
    if dead is not None:
        exact[dead[found]] = -np.inf
    order = np.lexsort((found, -exact), axis=-1)
    return np.take_along_axis(exact, order, 1), np.take_along_axis(found, order, 1)


def recall(index: VectorIndex, u: F32, k: int = 10, ef: int = EF) -> float:
    """The part of the true best k of each query (n, d) that `search` finds: 1 for a flat index."""
    found, truth = best(index, u, k, None, ef)[1], best(Tail(index.vectors, index.largest), u, k)[1]
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found.tolist(), truth.tolist(), strict=True)]))


def products(u: F32, vectors: F32, positions: I64) -> F32:
    """<u, z> (n, p) of some documents (n, p) of each query, rounded once: the same whichever others are asked for."""
    out = np.empty(positions.shape, np.float32)
    step = max(1, TILE // u.size)
    for start in range(0, positions.shape[1], step):
        part = vectors[positions[:, start : start + step]]
        out[:, start : start + step] = np.multiply(part, u[:, None], dtype=np.float64).sum(2)
    return out
