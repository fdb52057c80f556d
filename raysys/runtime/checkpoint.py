"""Checkpoints: named tensors in safetensors, everything else in JSON, a manifest as the moment of commitment.

Notable choices
- Whoever holds state writes its own file (`write_state`, atomic) and reports its SHA-256. The controller then writes the
  manifest, which names every file with its hash: before that the checkpoint does not exist, after that it is whole.
- Nothing is ever unpickled. A file is believed only if its hash is the manifest's, and the manifest only if it carries
  its own hash, a known format and the owner it was written for. What is refused is said, and the one before is used.
- The newest two are kept, so a checkpoint damaged on the disk costs rounds and not the run.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from raysys.runtime.storage import Storage, inside

FORMAT = 1
KEEP = 2
Tensors = Mapping[str, np.ndarray | torch.Tensor]


class CheckpointError(Exception):
    """A checkpoint file that is damaged, cut short, or not ours."""


def write_state(storage: Storage, name: str, tensors: Tensors, meta: Mapping[str, Any] | None = None) -> str:
    """Write named tensors (any shape; numpy or torch, any device) and JSON metadata to one file, atomically.

    Returns the SHA-256 of the file, which `read_state` and `Checkpoints.commit` ask for.
    """
    arrays = sorted(key for key, value in tensors.items() if isinstance(value, np.ndarray))
    packed = {key: _own_tensor(value) for key, value in tensors.items()}
    header = {"format": FORMAT, "meta": dict(meta or {}), "arrays": arrays}
    data = save_tensors(packed, {"raysys": json.dumps(header)})
    storage.write_bytes(name, data)
    return hashlib.sha256(data).hexdigest()


def read_state(storage: Storage, name: str, digest: str | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors (numpy where numpy was written) and metadata of a file; CheckpointError if it is not what it was."""
    data = _read(storage, name)
    if digest is not None and hashlib.sha256(data).hexdigest() != digest:
        raise CheckpointError(f"{name} has changed since it was written ({len(data)} bytes, SHA-256 differs)")
    try:
        (length,) = struct.unpack_from("<Q", data)
        header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["raysys"])
        if header["format"] != FORMAT:
            raise CheckpointError(f"{name} has format {header['format']}; this version reads format {FORMAT}")
        tensors: dict[str, Any] = load_tensors(data)
        for key in header["arrays"]:
            tensors[key] = tensors[key].numpy()
        return tensors, header["meta"]
    except (struct.error, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(
            f"{name} is not a whole state file ({len(data)} bytes, {error or 'unreadable'})"
        ) from error


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint: what to load to go on at `round`."""

    round: int
    files: dict[str, str]
    """File name (relative to the storage) -> SHA-256."""
    meta: dict[str, Any]


class Checkpoints:
    """The checkpoints under folder `prefix` of a storage.

    `owner` is written into each manifest, and one of another owner is refused. `refused(name, reason)` is called for
    every checkpoint that is passed over, `before_commit()` before each manifest is written.
    """

    def __init__(
        self,
        storage: Storage,
        prefix: str,
        owner: str = "",
        refused: Callable[[str, str], None] | None = None,
        before_commit: Callable[[], None] | None = None,
    ) -> None:
        self.storage, self.prefix, self.owner = storage, inside(prefix), owner
        self._refused, self._before_commit = refused, before_commit

    def folder(self, round: int) -> str:
        """Where the files of the checkpoint at `round` go (relative to the storage)."""
        if round < 0:
            raise ValueError(f"a checkpoint's round must be 0 or more, got {round}")
        return f"{self.prefix}/round-{round:09d}"

    def commit(self, round: int, files: Mapping[str, str], meta: Mapping[str, Any] | None = None) -> None:
        """Make the files (name -> SHA-256, written by then, inside `folder(round)`) the checkpoint at `round`."""
        folder = self.folder(round)
        for name in files:
            if not inside(name).startswith(folder + "/"):
                raise ValueError(f"a file of this checkpoint must lie in {folder}, got {name!r}")
        if self._before_commit is not None:
            self._before_commit()
        body = {"format": FORMAT, "owner": self.owner, "round": round, "files": dict(files), "meta": dict(meta or {})}
        body = json.loads(json.dumps(body))  # as it will be read: the digest must not depend on tuples or integer keys
        manifest = {**body, "digest": _digest(body)}
        self.storage.write_bytes(f"{folder}/manifest.json", json.dumps(manifest).encode())
        self._prune()

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint whose manifest and files all verify, or None. Refused ones are reported, then passed."""
        for folder in reversed(self.storage.folders(self.prefix)):
            if not self.storage.exists(f"{folder}/manifest.json"):
                continue  # killed before its commit: it never was a checkpoint
            try:
                return self._verified(folder)
            except CheckpointError as error:
                if self._refused is not None:
                    self._refused(folder, str(error))
        return None

    def _verified(self, folder: str) -> Checkpoint:
        name = f"{folder}/manifest.json"
        try:
            manifest = json.loads(_read(self.storage, name))
            digest = manifest.pop("digest")
            format, owner = manifest["format"], manifest["owner"]
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{name} is not a whole manifest") from error
        if digest != _digest(manifest):
            raise CheckpointError(f"{name} has changed since it was written")
        if format != FORMAT:
            raise CheckpointError(f"{name} has format {format}; this version reads format {FORMAT}")
        if owner != self.owner or self.folder(manifest["round"]) != folder:
            raise CheckpointError(f"{name} belongs to {owner or 'no run'!r} at round {manifest['round']}, not here")
        for file, expected in manifest["files"].items():
            data = _read(self.storage, file)
            if hashlib.sha256(data).hexdigest() != expected:
                raise CheckpointError(f"{file} has changed since it was written ({len(data)} bytes, SHA-256 differs)")
        return Checkpoint(manifest["round"], manifest["files"], manifest["meta"])

    def _prune(self) -> None:
        """Keep the newest KEEP committed checkpoints, and nothing of what was never committed before them."""
        folders = self.storage.folders(self.prefix)
        committed = [folder for folder in folders if self.storage.exists(f"{folder}/manifest.json")]
        if len(committed) > KEEP:
            for folder in folders[: folders.index(committed[-KEEP])]:
                self._delete(folder)

    def _delete(self, folder: str) -> None:
        self.storage.delete(f"{folder}/manifest.json")  # first: a half-deleted checkpoint is none
        self.storage.delete(folder)


def _own_tensor(value: np.ndarray | torch.Tensor) -> torch.Tensor:
    """A contiguous CPU tensor that shares memory with no other (safetensors refuses shared memory)."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.array(value, order="C", copy=True))
    return torch.clone(value.detach().cpu(), memory_format=torch.contiguous_format)


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _read(storage: Storage, name: str) -> bytes:
    try:
        return storage.read_bytes(name)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{name} cannot be read ({type(error).__name__})") from error
