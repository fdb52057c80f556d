"""A durable log of changes to one shard of an index: what was acknowledged is there after a kill or a power cut.

    changes-00000000.log    a line of JSON (format, d, fingerprint), then records; numbered segments, the last one grows
    lock                    flock: one process writes

A record is length (4 bytes), a digest of the length (8), a digest of the payload (16), and the payload: a line of JSON with ids
and texts, then the vectors (n, d) float32.

Notable choices
- `append` returns after fsync. Whoever comes while one flush is under way waits for the next one, which takes all of them: many
  writers share a flush (group commit).
- An end that was not wholly written was never acknowledged and is dropped at opening. Anything else that does not match its
  digest is refused: rather no answer than one without a document that was promised.
- After a write that failed nothing more is taken: what is on the disk is known again only after opening.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from raysys.runtime.sentences import UserError
from raysys.runtime.storage import Storage, flush_folder
from raysys.systems.rabtriever.index import F32
from raysys.systems.rabtriever.manifest import FORMAT

HEAD = struct.Struct("<I8s16s")
LOCK_POLL_S = 0.1


class Change(NamedTuple):
    """Documents put (over those of the same ids), or deleted: texts and vectors (n, d) float32 are None then."""

    ids: tuple[str, ...]
    texts: tuple[str, ...] | None = None
    vectors: F32 | None = None


class Journal:
    """The changes of one shard, opened for writing by one process.

    Args:
        folder: made if it is not there.
        applied: called with the changes of each flush, in order, once they are durable and before they are acknowledged.
        first: number of the first segment of a journal that is new.
        wait_s: how long to wait for another process to let go of it (one that is being killed does).

    Raises:
        UserError: another process has it, it belongs to another model, or a record is damaged.
    """

    def __init__(
        self,
        folder: Path,
        width: int,
        fingerprint: str,
        applied: Callable[[Sequence[Change]], None],
        first: int = 0,
        wait_s: float = 0.0,
    ) -> None:
        self.folder, self.width, self.applied = folder, width, applied
        self.head = {"format": FORMAT, "d": width, "fingerprint": fingerprint}
        self.flushes = 0
        self._pending: list[Change] = []
        self._asked = self._durable = 0  # changes asked for, and how many of them are durable
        self._queue, self._flush = threading.Lock(), threading.RLock()
        self._failed: str | None = None
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = self._take_lock(wait_s)
        try:
            self._segment = max(segments(self.folder), default=-1)
            if self._segment < 0:
                self._start(first)
            else:
                self._descriptor = self._reopen()
        except BaseException:
            os.close(self._lock)
            raise

    def _take_lock(self, wait_s: float) -> int:
        descriptor, deadline = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o644), time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return descriptor
            except OSError as error:
                if time.monotonic() >= deadline:
                    os.close(descriptor)
                    raise UserError(
                        f"journal: {self.folder} is in use by another process; expected one owner of a shard"
                    ) from error
                time.sleep(LOCK_POLL_S)

    @property
    def segment(self) -> int:
        """Number of the segment that grows."""
        return self._segment

    def _path(self, segment: int) -> Path:
        return self.folder / f"changes-{segment:08d}.log"

    def _start(self, segment: int) -> None:
        path = self._path(segment)
        Storage(self.folder).write_bytes(path.name, json.dumps(self.head).encode() + b"\n")
        flush_folder(self.folder)
        self._segment, self._descriptor = segment, os.open(path, os.O_WRONLY | os.O_APPEND)

    def _reopen(self) -> int:
        """Open the last segment to append to it, without what was not wholly written."""
        path = self._path(self._segment)
        end = max(end for _, end in self._records(path))
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
        if os.fstat(descriptor).st_size > end:
            os.ftruncate(descriptor, end)
        os.fsync(descriptor)  # what was read is kept, also where the last process was killed before its own flush
        return descriptor

    def _records(self, path: Path) -> Iterator[tuple[Change | None, int]]:
        """The changes of a segment, each with where it ends; first None with the end of the head line."""
        content = memoryview(path.read_bytes())
        line = bytes(content[:4096]).partition(b"\n")[0]
        try:
            told = json.loads(line)
        except ValueError as error:
            raise UserError(
                f"journal: {path} is damaged (its first line is no JSON); restore it from a copy"
            ) from error
        if told != self.head:
            raise UserError(
                f"journal: {path} holds changes of {told}; expected {self.head}, choose another folder of the index"
            )
        at = len(line) + 1
        yield None, at
        while at < len(content):
            rest = content[at:]
            if len(rest) < HEAD.size:
                return
            length, of_length, of_payload = HEAD.unpack(rest[: HEAD.size])
            whole = _digest(rest[:4], 8) == of_length
            if whole and HEAD.size + length > len(rest):
                return
            payload = rest[HEAD.size : HEAD.size + length]
            if not whole or _digest(payload, 16) != of_payload:
                if not any(rest):  # room that a power cut left empty
                    return
                raise UserError(f"journal: {path} is damaged at byte {at}; restore it from a copy, nothing was changed")
            at += HEAD.size + length
            yield _decode(payload, self.width), at

    def read(self, first: int) -> Iterator[Change]:
        """All durable changes from segment `first` on, in order. Hold `still` if more may come.

        Raises:
            UserError: a segment is missing or damaged.
        """
        there = segments(self.folder)
        if first > self._segment or [n for n in there if n >= first] != list(range(first, self._segment + 1)):
            raise UserError(
                f"journal: {self.folder} has segments {there}; expected all from {first} on, which this version does not hold"
            )
        for segment in range(first, self._segment + 1):
            for change, _ in self._records(self._path(segment)):
                if change is not None:
                    yield change

    def append(self, change: Change) -> None:
        """Make a change durable and apply it; several threads may call this at once.

        Raises:
            OSError: it could not be written; it may or may not be there after opening again.
        """
        with self._queue:
            self._pending.append(change)
            self._asked += 1
            mine = self._asked
        with self._flush:
            if self._durable >= mine:
                return
            self._refuse_failed()
            with self._queue:
                taken, self._pending = self._pending, []
                upto = self._asked
            try:
                _write(self._descriptor, b"".join(map(_encode, taken)))
                os.fsync(self._descriptor)
            except OSError as error:
                self._failed = str(error)
                raise
            self.flushes += 1
            self.applied(taken)
            self._durable = upto

    @property
    def still(self) -> threading.RLock:
        """While it is held, nothing is written or applied."""
        return self._flush

    @property
    def failed(self) -> str | None:
        """Why nothing more is taken, or None."""
        return self._failed

    def rotate(self) -> int:
        """Start a new segment, and return its number: changes from now on are in it.

        Raises:
            OSError: it could not be started; nothing more is taken, as after a write that failed.
        """
        with self._flush:
            self._refuse_failed()
            old = self._descriptor
            try:
                self._start(self._segment + 1)
                os.close(old)
            except BaseException as error:
                self._failed = f"{type(error).__name__}: {error}"
                raise
            return self._segment

    def _refuse_failed(self) -> None:
        if self._failed:
            raise OSError(f"journal: {self.folder} could not be written before ({self._failed}); open it again")

    def close(self) -> None:
        """Let another process have it."""
        with self._flush:
            self._failed = self._failed or "it was closed"
            os.close(self._descriptor)
            os.close(self._lock)


def segments(folder: Path) -> list[int]:
    """Numbers of the segments in a journal's folder, in order."""
    found = [path.stem.removeprefix("changes-") for path in folder.glob("changes-*.log")]
    return sorted(int(number) for number in found if number.isdigit())


def _digest(data: Any, size: int) -> bytes:
    return hashlib.blake2b(data, digest_size=size).digest()


def _encode(change: Change) -> bytes:
    told = json.dumps({"ids": change.ids, "texts": change.texts}, ensure_ascii=False).encode()
    vectors = b"" if change.vectors is None else np.ascontiguousarray(change.vectors, "<f4").tobytes()
    payload = told + b"\n" + vectors
    length = struct.pack("<I", len(payload))
    return length + _digest(length, 8) + _digest(payload, 16) + payload


def _decode(payload: memoryview, width: int) -> Change:
    line, _, vectors = bytes(payload).partition(b"\n")
    told = json.loads(line)
    if told["texts"] is None:
        return Change(tuple(told["ids"]))
    return Change(
        tuple(told["ids"]), tuple(told["texts"]), np.frombuffer(vectors, "<f4").reshape(len(told["ids"]), width)
    )


def _write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
