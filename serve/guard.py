"""What every Serve app of this project shares: keys, limits, deadlines, one-sentence errors, /healthz and /metrics.

    def __serve_build_asgi_app__(self):                 # of an ingress deployment: @serve.deployment @serve.ingress()
        app = guarded_app("title", config.guard, self.keys, self.meters, ready=..., snapshots=...)
        @app.post("/answer") ...

Notable choices
- A request is checked from cheap to dear: key, how many are waiting, size of the body, and only then is it parsed. All of it
  happens within the request's deadline.
- Replicas get SHA-256 digests of the keys, never the keys, and compare in constant time.
- Whatever goes wrong, the answer is {"error": "one sentence"} with the status that fits; a traceback goes to the log.
- /healthz, /metrics and /docs need no key: they hold no text and no name of an adapter. Keep the port itself private.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import Field
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raysys.runtime.config import Config, read_text
from raysys.runtime.sentences import UserError
from serve.meters import FrontMeters, Snapshot, exposition
from serve.refusal import Refused

KEYS_VARIABLE = "RAYSYS_API_KEYS"
SHORTEST_KEY = 16
OPEN = ("/healthz", "/metrics", "/docs", "/openapi.json")
HEALTH_TIMEOUT_S = 5.0
DEADLINE = "raysys.deadline"
"""Entry of a request's scope: when it will be cut off, by the loop's clock. A stream can end with a sentence before."""

log = logging.getLogger("ray.serve")


class GuardConfig(Config):
    """Who may ask, how much, and for how long."""

    auth: Literal["keys", "none"] = "keys"
    """`keys`: every request needs a key, and without any key configured the app does not start. `none`: anyone may ask."""
    keys_file: str | None = None
    """File (path or URI) with one API key per line; otherwise the variable RAYSYS_API_KEYS, separated by commas."""
    max_body_kib: int = Field(256, ge=1, le=1_048_576)
    """Largest body of a request, in KiB; above it 413."""
    timeout_s: float = Field(30.0, gt=0, le=3600)
    """A request that is not answered by then gets 504, and its work is dropped."""
    max_waiting: int = Field(256, ge=1, le=100_000)
    """Requests that one front replica holds at once; above it 503."""

    def digests(self) -> tuple[str, ...]:
        """SHA-256 digests of the allowed keys; empty where no key is asked for.

        Raises:
            UserError: keys are asked for and there are none, or one is too short.
        """
        if self.auth == "none":
            return ()
        if self.keys_file is not None:
            source, found = f"keys_file {self.keys_file}", read_text(self.keys_file, "keys_file").splitlines()
        else:
            source, found = KEYS_VARIABLE, os.environ.get(KEYS_VARIABLE, "").split(",")
        keys = [key.strip() for key in found if key.strip() and not key.strip().startswith("#")]
        if not keys:
            raise UserError(
                f"auth: got keys, but {source} holds none; give one (openssl rand -hex 24), or auth none to serve anyone"
            )
        for place, key in enumerate(keys, 1):
            if len(key) < SHORTEST_KEY:
                raise UserError(
                    f"auth: key {place} of {source} has {len(key)} characters; expected at least {SHORTEST_KEY}"
                )
        return tuple(hashlib.sha256(key.encode()).hexdigest() for key in keys)


def error(status: int, sentence: str) -> JSONResponse:
    """The answer to a request that is refused."""
    extra = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "1"}}
    written = " ".join(sentence.split()).encode(errors="backslashreplace").decode()  # users can send half a character
    return JSONResponse({"error": written}, status, extra.get(status))


class Guard:
    """ASGI middleware: key, number waiting, body size, deadline; counts and times every request."""

    def __init__(
        self,
        app: ASGIApp,
        config: GuardConfig,
        keys: Sequence[str],
        meters: FrontMeters,
        routes: Callable[[], set[str]],
        also_open: Sequence[str] = (),
    ) -> None:
        self.app, self.config, self.keys, self.meters, self.routes = app, config, keys, meters, routes
        self.open = {*OPEN, *also_open}
        self.waiting = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        status, began = 0, time.perf_counter()

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if path in self.open:
                await self.app(scope, receive, sending)
            else:
                await self._checked(scope, receive, sending)
        except Refused as refused:
            await error(refused.status, refused.sentence)(scope, receive, sending)
        except TimeoutError:
            if status:  # part of the answer has been sent: it can only be cut off
                raise
            limit = f"{self.config.timeout_s:g} s"
            await error(504, f"timeout: no answer within {limit}; ask again later")(scope, receive, sending)
        finally:
            route = path if path in self.routes() else "other"
            self.meters.request(route, status or 500, time.perf_counter() - began)

    async def _checked(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name: value for name, value in scope["headers"] if name in (b"authorization", b"content-length")}
        if self.config.auth == "keys" and not self._known(headers.get(b"authorization", b"")):
            raise Refused(401, "key: missing or unknown; expected the header 'Authorization: Bearer KEY'")
        if self.waiting >= self.config.max_waiting:
            raise Refused(503, f"busy: {self.waiting} requests are waiting already; ask again later")
        self.waiting += 1
        self.meters.waiting.set(self.waiting)
        try:
            async with asyncio.timeout(self.config.timeout_s) as limit:
                scope[DEADLINE] = limit.when()
                body = await self._body(headers.get(b"content-length", b""), receive)
                await self.app(scope, _replayed(body, receive), send)
        finally:
            self.waiting -= 1
            self.meters.waiting.set(self.waiting)

    def _known(self, header: bytes) -> bool:
        scheme, _, key = header.partition(b" ")
        digest = hashlib.sha256(key.strip()).hexdigest()
        matches = [hmac.compare_digest(digest, known) for known in self.keys]  # all of them: no early end
        return scheme.lower() == b"bearer" and any(matches)

    async def _body(self, declared: bytes, receive: Receive) -> bytes:
        limit = self.config.max_body_kib * 1024
        told = int(declared) if declared.isdigit() else 0
        parts, size = [], 0
        while told <= limit:
            message = await receive()
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > limit:
                break
            if not message.get("more_body", False):
                return b"".join(parts)
        raise Refused(413, f"body: got {max(told, size)} bytes or more; at most {limit} are allowed")


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Hand over a body that has been read, then whatever else comes (a disconnect)."""
    parts = [body]

    async def again() -> Message:
        return {"type": "http.request", "body": parts.pop(), "more_body": False} if parts else await receive()

    return again


def guarded_app(
    title: str,
    description: str,
    config: GuardConfig,
    keys: Sequence[str],
    meters: FrontMeters,
    ready: Callable[[], Awaitable[Any]],
    snapshots: Callable[[], Awaitable[Mapping[str, Snapshot]]],
    also_open: Sequence[str] = (),
) -> FastAPI:
    """A FastAPI app behind a Guard, with /healthz, /metrics and errors of one sentence.

    Args:
        keys: digests from `GuardConfig.digests`.
        ready: returns when the app can answer, raises while it cannot.
        snapshots: metrics of every replica, by its name.
        also_open: paths that need no key besides /healthz, /metrics and the documentation; such as a page without data.
    """
    app = FastAPI(title=title, description=description, redoc_url=None)

    def routes() -> set[str]:
        return {str(getattr(route, "path", "")) for route in app.routes}

    app.add_middleware(Guard, config=config, keys=keys, meters=meters, routes=routes, also_open=also_open)

    @app.get("/healthz", summary="200 once every part of the app can answer", tags=["operation"])
    async def healthz() -> dict[str, str]:
        try:
            async with asyncio.timeout(HEALTH_TIMEOUT_S):
                await ready()
        except (TimeoutError, RayError, RayServeException) as wrong:
            raise Refused(503, "health: the model is not ready") from wrong
        return {"status": "ok"}

    @app.get("/metrics", summary="Prometheus metrics of all replicas", tags=["operation"])
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(exposition(await snapshots()), media_type=CONTENT_TYPE_LATEST)

    _speak(app)
    return app


def _speak(app: FastAPI) -> None:
    """Answer every error with one sentence."""

    @app.exception_handler(Refused)
    async def refused(request: Request, wrong: Refused) -> JSONResponse:
        return error(wrong.status, wrong.sentence)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, wrong: RequestValidationError) -> JSONResponse:
        return error(422, invalid_sentence(wrong.errors()[0]))

    @app.exception_handler(HTTPException)
    async def plain(request: Request, wrong: HTTPException) -> JSONResponse:
        if wrong.status_code == 400:  # FastAPI could not decode the body
            return error(422, "body: cannot be read; expected JSON in UTF-8")
        return error(wrong.status_code, f"{request.method} {request.url.path}: {str(wrong.detail).lower()}")

    async def away(request: Request, wrong: Exception) -> JSONResponse:
        log.warning("a replica did not answer: %s", wrong)
        return error(503, "busy: a part of the app is starting, full or was lost; ask again later")

    app.add_exception_handler(RayError, away)
    app.add_exception_handler(RayServeException, away)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, wrong: Exception) -> JSONResponse:
        log.error("unexpected error", exc_info=wrong)
        return error(500, "app: an unexpected error, which the log describes")


def invalid_sentence(problem: Mapping[str, Any]) -> str:
    """What pydantic found wrong with a body: `field: got value; what is expected`."""
    place = ".".join(str(part) for part in problem["loc"] if part != "body") or "body"
    said = str(problem["msg"])
    said = said[:1].lower() + said[1:]
    if problem["type"] == "json_invalid":
        return f"body: is not valid JSON ({problem.get('ctx', {}).get('error', said)})"
    if isinstance(problem.get("input"), bytes):
        return "body: is not marked as JSON; expected the header 'Content-Type: application/json'"
    if problem["type"] == "missing":
        return f"{place}: is missing"
    shown = repr(problem.get("input"))
    return f"{place}: got {shown if len(shown) <= 80 else shown[:77] + '...'}; {said}"
