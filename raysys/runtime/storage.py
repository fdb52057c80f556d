"""Files of a run on any path or URI that pyarrow.fs opens, written so that a kill at any moment loses nothing.

Notable choices
- Local files: written to a temporary name, flushed to the disk, renamed over the target; then the folder is flushed.
  POSIX renames are atomic, so a reader sees the old content or the new one, never a part.
- Object stores (s3, gs): one object is one PUT or one completed multipart upload, which the stores make visible
  atomically and, since 2020, with strong read-after-write consistency. There is no rename and none is needed. What must
  hold over several objects is built on that: parts first, the manifest that names them (with hashes) last.
- A Storage is pickled as its URI, so an actor on another machine opens it there and writes its own files.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

from pyarrow import ArrowException
from pyarrow import fs as arrow

from raysys.runtime.sentences import UserError

TEMPORARY = re.compile(r"\.[^/]*\.[0-9a-f]{12}\.tmp$")


@cache
def _filesystem(scheme: str, authority: str) -> arrow.FileSystem:
    """One connection per store and process."""
    return arrow.FileSystem.from_uri(f"{scheme}://{authority}/")[0]


class Storage:
    """A folder at a path or URI. File names are relative to it, with '/' between parts, and cannot leave it."""

    def __init__(self, uri: str | os.PathLike[str]) -> None:
        self.uri = os.fspath(uri).rstrip("/") or "/"
        scheme, _, rest = self.uri.partition("://")
        if rest and scheme != "file":
            parts = urlsplit(self.uri)
            try:
                self._fs = _filesystem(scheme, parts.netloc)
            except (ArrowException, OSError, ValueError) as error:
                why = str(error).splitlines()[0]
                raise UserError(
                    f"storage: got {uri}; expected a path or a URI that pyarrow.fs opens ({why})"
                ) from error
            self._root = f"{parts.netloc}{parts.path}"
            self.local: Path | None = None
        else:
            self.local = Path(unquote(rest) if rest else self.uri).expanduser().absolute()
            self.uri = str(self.local)

    def __reduce__(self) -> tuple[type[Storage], tuple[str]]:
        return Storage, (self.uri,)

    def __repr__(self) -> str:
        return f"Storage({self.uri!r})"

    def join(self, name: str) -> Storage:
        """The folder `name` inside this one."""
        return Storage(self.address(name))

    def address(self, name: str) -> str:
        """The path or URI of a file inside this folder."""
        return f"{self.uri.rstrip('/')}/{inside(name)}"

    def read_bytes(self, name: str) -> bytes:
        """The whole file; FileNotFoundError if there is none."""
        if self.local is not None:
            return (self.local / inside(name)).read_bytes()
        with self._fs.open_input_stream(self._path(name)) as stream:
            return bytes(stream.read())

    def write_bytes(self, name: str, data: bytes, durable: bool = True) -> None:
        """Create or replace a file atomically; `durable` also waits until it would survive a power cut."""
        if self.local is None:
            path = self._path(name)
            self._fs.create_dir(path.rpartition("/")[0], recursive=True)
            with self._fs.open_output_stream(path) as stream:
                stream.write(data)
            return
        target = self.local / inside(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name[:200]}.{secrets.token_hex(6)}.tmp")
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        if durable:
            flush_folder(target.parent)

    def exists(self, name: str) -> bool:
        """Whether there is a file of that name."""
        if self.local is not None:
            return (self.local / inside(name)).is_file()
        return self._fs.get_file_info(self._path(name)).type == arrow.FileType.File

    def files(self, name: str = "", recursive: bool = False) -> list[str]:
        """Names (relative to this storage, sorted) of the files in folder `name`; an absent folder is empty."""
        if self.local is not None:
            folder = self.local / inside(name) if name else self.local
            found = folder.rglob("*") if recursive else folder.glob("*")
            return sorted(str(path.relative_to(self.local)) for path in found if path.is_file())
        root = self._path(name) if name else self._root
        chosen = arrow.FileSelector(root, recursive=recursive, allow_not_found=True)
        files = [info.path for info in self._fs.get_file_info(chosen) if info.type == arrow.FileType.File]
        return sorted(path.removeprefix(self._root).lstrip("/") for path in files)

    def folders(self, name: str = "") -> list[str]:
        """Names (relative to this storage, sorted) of the folders directly in `name`."""
        prefix = f"{inside(name)}/" if name else ""
        if self.local is not None:
            found = [path for path in (self.local / prefix).glob("*") if path.is_dir()]
            return sorted(str(path.relative_to(self.local)) for path in found)
        deep = [path.removeprefix(prefix) for path in self.files(name, recursive=True)]
        return sorted({prefix + path.partition("/")[0] for path in deep if "/" in path})

    def delete(self, name: str) -> None:
        """Delete a file, or a folder with all that is in it; nothing happens if there is none."""
        if self.local is not None:
            target = self.local / inside(name)
            for file in sorted(target.rglob("*"), reverse=True) if target.is_dir() else []:
                file.rmdir() if file.is_dir() and not file.is_symlink() else file.unlink(missing_ok=True)
            if target.is_dir():
                target.rmdir()
            else:
                target.unlink(missing_ok=True)
            return
        path = self._path(name)
        kind = self._fs.get_file_info(path).type
        if kind == arrow.FileType.Directory:
            self._fs.delete_dir(path)
        elif kind == arrow.FileType.File:
            self._fs.delete_file(path)

    def sweep(self) -> int:
        """Delete temporary files that a killed process left behind; returns how many."""
        stray = [n for n in self.files(recursive=True) if TEMPORARY.search("/" + n)] if self.local is not None else []
        for name in stray:
            self.delete(name)
        return len(stray)

    def _path(self, name: str) -> str:
        return f"{self._root}/{inside(name)}"


class Log:
    """A file of lines that only grows. A line is whole or, after a kill, dropped when the file is opened again.

    Local files are appended to with one write per line. Object stores cannot append: lines are kept in memory and the
    object is replaced at each `flush`, which the caller does at barriers and now and then.
    """

    def __init__(self, storage: Storage, name: str) -> None:
        self.storage, self.name = storage, name
        content = storage.read_bytes(name) if storage.exists(name) else b""
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            storage.write_bytes(name, whole)
        self._pending = whole if storage.local is None else b""
        self._descriptor: int | None = None
        self._dirty = False

    def read(self) -> list[bytes]:
        """All lines: those found at opening and those appended since."""
        if self.storage.local is None:
            return self._pending.splitlines()
        return self.storage.read_bytes(self.name).splitlines() if self.storage.exists(self.name) else []

    def append(self, line: bytes) -> None:
        """Add one line; a process killed after this call returned has not lost it (on local storage)."""
        if b"\n" in line:
            raise ValueError(f"a line of {self.name} cannot contain a line break")
        self._dirty = True
        data = line + b"\n"
        if self.storage.local is None:
            self._pending += data
            return
        if self._descriptor is None:
            path = self.storage.local / self.name
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        while data:
            data = data[os.write(self._descriptor, data) :]

    def keep(self, wanted: Callable[[bytes], bool]) -> int:
        """Keep only the wanted lines, replacing the file atomically; returns how many were dropped."""
        lines = self.read()
        kept = [line for line in lines if wanted(line)]
        if len(kept) < len(lines):
            self.close()
            content = b"".join(line + b"\n" for line in kept)
            self.storage.write_bytes(self.name, content)
            self._pending = content if self.storage.local is None else b""
        return len(lines) - len(kept)

    def flush(self) -> None:
        """Make what was appended durable."""
        if self._dirty and self._descriptor is not None:
            os.fsync(self._descriptor)
        elif self._dirty:
            self.storage.write_bytes(self.name, self._pending)
        self._dirty = False

    def close(self) -> None:
        self.flush()
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def inside(name: str) -> str:
    """`name` if it is a relative path that stays inside its folder, else ValueError."""
    parts = name.split("/")
    if not name or name.startswith("/") or "\\" in name or "\0" in name or any(p in ("", ".", "..") for p in parts):
        raise ValueError(f"a file name must be relative and stay inside its folder, got {name!r}")
    return name


def flush_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
