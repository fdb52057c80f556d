"""Documents with their vectors, some at a time, and as files: a line of JSON with a SHA-256, then the bytes.

Shapes: m documents, d width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from raysys.runtime.sentences import UserError
from raysys.runtime.storage import Storage
from raysys.systems.rabtriever.index import F32
from raysys.systems.rabtriever.manifest import joined


class Chunk(NamedTuple):
    """Some documents: ids (m,), texts (m,), vectors (m, d) float32."""

    ids: Sequence[str]
    texts: Sequence[str]
    vectors: F32


def write_chunk(path: Path, chunk: Chunk) -> None:
    """Write a chunk over one that may be there; durable when it returns."""
    ids, ids_blob = joined(chunk.ids)
    texts, texts_blob = joined(chunk.texts)
    body = b"".join(
        [ids.tobytes(), texts.tobytes(), np.ascontiguousarray(chunk.vectors).tobytes(), ids_blob, texts_blob]
    )
    head = {"m": len(chunk.ids), "ids": len(ids_blob), "sha256": hashlib.sha256(body).hexdigest()}
    Storage(path.parent).write_bytes(path.name, json.dumps(head).encode() + b"\n" + body)


def _split(path: Path) -> tuple[dict[str, Any], bytes]:
    head, _, body = path.read_bytes().partition(b"\n")
    try:
        told: dict[str, Any] = json.loads(head)
        if hashlib.sha256(body).hexdigest() == told["sha256"]:
            return told, body
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"index: {path} is no whole chunk ({error}); put it again") from error
    raise UserError(f"index: {path} is no whole chunk (its SHA-256 is another one); put it again")


def whole(path: Path) -> bool:
    """Whether a file holds all of a chunk."""
    try:
        _split(path)
    except UserError:
        return False
    return True


def read_chunk(path: Path, width: int) -> Chunk:
    """A chunk of vectors of this width.

    Raises:
        UserError: it is not whole.
    """
    told, body = _split(path)
    m, view = int(told["m"]), memoryview(body)
    ids, texts = np.frombuffer(view[: 8 * (m + 1)], np.int64), np.frombuffer(view[8 * (m + 1) : 16 * (m + 1)], np.int64)
    at = 16 * (m + 1) + 4 * m * width
    vectors = np.frombuffer(view[16 * (m + 1) : at], np.float32).reshape(m, width)
    blobs = view[at : at + int(told["ids"])], view[at + int(told["ids"]) :]
    found = [[str(b[o[i] : o[i + 1]], "utf-8") for i in range(m)] for o, b in zip((ids, texts), blobs, strict=True)]
    return Chunk(found[0], found[1], vectors)
