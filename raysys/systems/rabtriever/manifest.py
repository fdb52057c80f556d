"""What an index folder says of itself, and whether its files are as it says."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raysys.runtime.sentences import UserError

FORMAT, MANIFEST, GRAPH = 1, "manifest.json", "graph.faiss"


def read_manifest(folder: Path, verify: bool = True) -> dict[str, Any]:
    """The manifest of an index folder whose files are as it says.

    Raises:
        UserError: there is none, it is not one, or a file is missing, of another size, or (`verify`) of another content.
    """
    try:
        told = json.loads((folder / MANIFEST).read_bytes())
        wrong = next((name for name, check in _FIELDS.items() if not check(told[name])), None)
        files = {name: (int(size), str(digest)) for name, (size, digest) in told["files"].items()}
    except FileNotFoundError as error:
        raise UserError(
            f"index: got {folder}; there is no {MANIFEST}, so it is no index or was never finished"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(folder, MANIFEST, f"{type(error).__name__}: {error}") from error
    if wrong is not None:
        raise damaged(folder, MANIFEST, f"{wrong} is {told[wrong]!r}")
    needed = {"vectors.npy", "ids.bin", "ids.npy", "texts.bin", "texts.npy", "lookup.npy"}
    needed |= {GRAPH} if told["kind"] == "hnsw" and told["m"] else set()
    if set(files) != needed:
        raise damaged(folder, MANIFEST, f"it lists {sorted(files)}")
    for name, (size, digest) in files.items():
        path = folder / name
        got = path.stat().st_size if path.is_file() else -1
        if got != size:
            raise damaged(folder, name, "it is missing" if got < 0 else f"{got} bytes, expected {size}")
        if verify and sha256(path) != digest:
            raise damaged(folder, name, "its SHA-256 is another one")
    return dict(told)


_FIELDS: dict[str, Callable[[Any], bool]] = {
    "format": lambda x: x == FORMAT,
    "kind": lambda x: x in ("flat", "hnsw"),
    "m": lambda x: type(x) is int and x >= 0,
    "d": lambda x: type(x) is int and x >= 1,
    "fingerprint": lambda x: isinstance(x, str) and bool(x),
    "largest_norm": lambda x: isinstance(x, (int, float)) and 0 <= x < np.inf,
    "journal": lambda x: type(x) is int and x >= 0,
}


def damaged(folder: Path, name: str, why: str) -> UserError:
    """What is said of an index that is not whole."""
    return UserError(f"index: {folder / name} is damaged ({' '.join(why.split())}); build the index again")


def refuse_other(folder: Path, got: str, expected: str | None) -> None:
    """Raise UserError where vectors come from another model than the queries will."""
    if expected is not None and got != expected:
        raise UserError(
            f"index: {folder} holds vectors of the model {got}; expected those of {expected}, build it again with this model"
        )


def sha256(path: Path) -> str:
    """The digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def id_hash(id: str) -> int:
    """64 bits of an id, the same in every process: where it is looked up, and which shard has it."""
    return int.from_bytes(hashlib.blake2b(id.encode(), digest_size=8).digest(), "little", signed=True)


def joined(strings: Sequence[str]) -> tuple[NDArray[np.int64], bytes]:
    """Offsets (m + 1,) and bytes of strings, one after the other."""
    parts = [one.encode() for one in strings]
    return np.cumsum([0, *map(len, parts)], dtype=np.int64), b"".join(parts)
