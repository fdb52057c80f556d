"""An app on this machine, from the command line: what every `python -m serve.<app>` shares."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable
from contextlib import suppress

from pydantic import Field
from ray import serve as ray_serve
from ray.serve import Application

from raysys.runtime.config import Config
from raysys.runtime.sentences import UserError
from raysys.runtime.session import ClusterConfig, Session
from serve.guard import GuardConfig


class Here(Config):
    """Where an app listens, and on which Ray it runs."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all of this machine's."""
    port: int = Field(8000, ge=1, le=65_535)
    """Port to listen on."""
    address: str | None = None
    """Ray cluster to run on (host:port); otherwise RAY_ADDRESS, otherwise an embedded Ray."""


def free_port(host: str, port: int) -> None:
    """Refuse a port on which something listens: Serve would share it, and each would get a part of the requests.

    Raises:
        UserError: something listens there.
    """
    with suppress(OSError), socket.create_connection((host.replace("0.0.0.0", "127.0.0.1"), port), timeout=1.0):
        raise UserError(f"port: got {port}; something listens there already, choose another --port")


def serve_here(here: Here, guard: GuardConfig, build: Callable[[], Application], name: str, try_at: str) -> None:
    """Serve an app until interrupted.

    Raises:
        UserError: the app cannot be built, the port is taken, or anyone could reach an app without keys.
    """
    if guard.auth == "none" and here.host not in ("127.0.0.1", "localhost", "::1"):
        raise UserError(f"host: got {here.host} with guard.auth none; without keys only 127.0.0.1 is allowed")
    app = build()
    free_port(here.host, here.port)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    with Session(ClusterConfig(address=here.address)):
        ray_serve.start(http_options={"host": here.host, "port": here.port})
        ray_serve.run(app, name=name)
        print(f"ready: http://{here.host}:{here.port} (try it at {try_at}; Ctrl-C ends it)", flush=True)
        try:
            while True:
                time.sleep(3600)
        finally:
            ray_serve.shutdown()
