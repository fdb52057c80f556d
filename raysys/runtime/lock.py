"""One process per run folder.

Notable choices
- Local: flock, which the kernel releases when the process dies, however it dies.
- Object stores have no lock and, through pyarrow, no conditional write: a lease object with a heartbeat. A second process
  that finds a fresh lease of another is refused; a lease without heartbeat for EXPIRY seconds is taken over. After taking
  it, it is read back once, which settles all but writes in the same instant; clocks are assumed within seconds.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
import sys
import threading
import time

from raysys.runtime.sentences import UserError
from raysys.runtime.storage import Storage

HEARTBEAT = 10.0
EXPIRY = 60.0


class RunLock:
    """Exclusive use of a run folder, from construction to `release`; UserError if another process has it."""

    def __init__(self, storage: Storage, name: str = "lock") -> None:
        self.storage, self.name = storage, name
        self.owner = f"process {os.getpid()} on {socket.gethostname()}"
        self._token = secrets.token_hex(8)
        self._stop = threading.Event()
        self._descriptor: int | None = None
        if storage.local is not None:
            self._lock_file()
        else:
            self._take_lease()

    def release(self) -> None:
        """Let others have the run folder. Harmless when repeated."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        elif self.storage.local is None and not self._stop.is_set():
            self._stop.set()
            self._heart.join()
            if self._holder().get("token") == self._token:
                self.storage.delete(self.name)

    def _lock_file(self) -> None:
        assert self.storage.local is not None
        descriptor = os.open(self.storage.local / self.name, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            raise UserError(
                f"resume: got {self.storage.uri}, which {holder} is using; expected a run in use by none"
            ) from error
        os.ftruncate(descriptor, 0)
        os.write(descriptor, self.owner.encode())
        self._descriptor = descriptor

    def _take_lease(self) -> None:
        self._refuse_if_held()
        self._beat()
        if self._holder().get("token") != self._token:
            self._refuse_if_held()
        self._heart = threading.Thread(target=self._keep_beating, name="run-lease", daemon=True)
        self._heart.start()

    def _refuse_if_held(self) -> None:
        holder = self._holder()
        age = time.time() - float(holder.get("time", 0.0))
        if holder.get("token") not in (None, self._token) and age < EXPIRY:
            raise UserError(
                f"resume: got {self.storage.uri}, which {holder.get('owner')} was using {max(age, 0):.0f} s ago; "
                f"expected a run in use by none (a killed process's lease expires after {EXPIRY:.0f} s)"
            )

    def _holder(self) -> dict[str, str]:
        try:
            return dict(json.loads(self.storage.read_bytes(self.name)))
        except (FileNotFoundError, ValueError):
            return {}

    def _beat(self) -> None:
        lease = {"token": self._token, "owner": self.owner, "time": time.time()}
        self.storage.write_bytes(self.name, json.dumps(lease).encode())

    def _keep_beating(self) -> None:
        while not self._stop.wait(HEARTBEAT):
            try:
                self._beat()
            except OSError as error:  # the store may come back before the lease expires; the run's own writes will tell
                print(f"warning: the lease on {self.storage.uri} could not be renewed ({error})", file=sys.stderr)
