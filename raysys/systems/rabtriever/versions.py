"""The folder of an index: versions that never change, a file that names the one to serve, and the changes since.

    root.json                     {"format": 1, "d", "fingerprint", "shards"}: for life
    CURRENT                       name of the version to serve
    versions/<name>/version.json  {"format": 1, "shards", "kind", "m"[, "digest"]}
    versions/<name>/shard-000/    a VectorIndex
    journal/shard-000/            changes since (journal.py)
    building/<name>/              a version that is not finished (build.py)

Notable choices
- The root is a local folder, or one of a file system with locks: it is mapped into memory and locked with flock.
- A root keeps its fingerprint and number of shards. Changes are kept as vectors by shard; with another model or number of
  shards they would be lost or wrong, so a new root is asked for.
- A version is made elsewhere and renamed into place, and CURRENT is replaced atomically: whoever reads sees all of it or nothing.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raysys.runtime.sentences import UserError, closest
from raysys.runtime.storage import Storage, flush_folder
from raysys.systems.rabtriever.index import VectorIndex
from raysys.systems.rabtriever.manifest import FORMAT, id_hash, refuse_other

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
CURRENT, ROOT, VERSION = "CURRENT", "root.json", "version.json"
MOST_SHARDS = 1000


def shard_of(id: str, shards: int) -> int:
    """The shard that has a document, whatever else there is."""
    return id_hash(id) % shards


def shard_folder(shard: int) -> str:
    """Name of a shard's folder."""
    return f"shard-{shard:03d}"


def local(folder: str | Path) -> Path:
    """The absolute path of an index.

    Raises:
        UserError: it is a URI.
    """
    if "://" in str(folder):
        raise UserError(f"index: got {folder}; expected a folder on a disk, since it is mapped into memory and locked")
    return Path(folder).expanduser().absolute()


@dataclass(frozen=True)
class Root:
    """A root folder: width d of the vectors, fingerprint of their model, number of shards."""

    folder: Path
    width: int
    fingerprint: str
    shards: int

    @classmethod
    def open(cls, folder: str | Path) -> Root:
        """The root that lies there.

        Raises:
            UserError: there is none, or it cannot be read.
        """
        path = local(folder)
        try:
            told = json.loads((path / ROOT).read_bytes())
            if told["format"] != FORMAT:
                raise ValueError(f"format {told['format']!r}, expected {FORMAT}")
            root = cls(path, int(told["d"]), str(told["fingerprint"]), int(told["shards"]))
        except FileNotFoundError as error:
            raise UserError(
                f"index: got {folder}; there is no index, build one with python -m jobs.rabtriever index"
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"index: {path / ROOT} cannot be read ({type(error).__name__}: {error})") from error
        return root

    @classmethod
    def make(cls, folder: str | Path, width: int, fingerprint: str, shards: int | None = None) -> Root:
        """The root that lies there, or a new one.

        Raises:
            UserError: one lies there that has another width, fingerprint or number of shards, or a value is not allowed.
        """
        path = local(folder)
        if width < 1 or not fingerprint:
            raise UserError(f"width: got {width} with fingerprint {fingerprint!r}; expected at least 1 and some text")
        if shards is not None and not 1 <= shards <= MOST_SHARDS:
            raise UserError(f"shards: got {shards}; expected from 1 to {MOST_SHARDS}")
        if not (path / ROOT).exists():
            told = {"format": FORMAT, "d": width, "fingerprint": fingerprint, "shards": shards or 1}
            Storage(path).write_bytes(ROOT, json.dumps(told).encode())
        root = cls.open(path)
        refuse_other(path, root.fingerprint, fingerprint)
        if (root.width, root.shards) != (width, shards or root.shards):
            raise UserError(
                f"shards: got {shards} with vectors of width {width}; {path} has {root.shards} of width {root.width} for life,"
                " choose another folder"
            )
        return root

    def version_folder(self, version: str, under: str = "versions") -> Path:
        """Where a version lies or will lie.

        Raises:
            UserError: the name is not allowed: letters, digits, '.', '_' and '-' are.
        """
        if not NAME.fullmatch(version):
            raise UserError(
                f"version: got {version[:120]!r}; expected 1 to 100 letters, digits, '.', '_' or '-', a letter or digit first"
            )
        return self.folder / under / version

    def versions(self) -> list[str]:
        """Names of the finished versions."""
        return sorted(p.parent.name for p in (self.folder / "versions").glob(f"*/{VERSION}"))

    def current(self) -> str:
        """The name of the version to serve.

        Raises:
            UserError: none was published, or CURRENT holds no name.
        """
        try:
            name = (self.folder / CURRENT).read_bytes()[:200].decode().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"index: {self.folder} names no version to serve; publish one") from error
        self.version_folder(name)
        return name

    def check(self, version: str) -> dict[str, Any]:
        """What version.json of a finished version says.

        Raises:
            UserError: there is no such version, or it does not belong to this root.
        """
        path = self.version_folder(version) / VERSION
        try:
            told = json.loads(path.read_bytes())
            got = told["shards"]
        except FileNotFoundError as error:
            hint = closest(version, self.versions())
            raise UserError(
                f"version: got {version!r}; {self.folder} has no finished one of that name{hint}"
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"version: {path} cannot be read ({type(error).__name__}: {error})") from error
        if got != self.shards:
            raise UserError(f"version: {version} has {got} shards; expected {self.shards}, those of {self.folder}")
        for s in range(self.shards):
            VectorIndex(path.parent / shard_folder(s), self.fingerprint, verify=False)
        return dict(told)

    def load(self, version: str, shard: int) -> VectorIndex:
        """One shard of a version, every file checked.

        Raises:
            UserError: it is not there, not whole, or of another fingerprint.
        """
        return VectorIndex(self.version_folder(version) / shard_folder(shard), self.fingerprint)

    def journal_folder(self, shard: int) -> Path:
        """Where the changes of a shard lie."""
        return self.folder / "journal" / shard_folder(shard)

    def settle(self, made: Path, version: str, told: Mapping[str, Any]) -> Path:
        """Rename the finished folder `made` into place as a version."""
        Storage(made).write_bytes(VERSION, json.dumps(told).encode())
        target = self.version_folder(version)
        target.parent.mkdir(exist_ok=True)
        os.rename(made, target)
        flush_folder(target.parent)
        flush_folder(made.parent)
        return target


def publish(root: str | Path, version: str) -> None:
    """Make a finished version the one to serve; running apps go over to it.

    Raises:
        UserError: there is no such version, or it does not belong to this root.
    """
    opened = Root.open(root)
    opened.check(version)
    Storage(opened.folder).write_bytes(CURRENT, version.encode() + b"\n")
