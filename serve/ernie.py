"""The unified model over HTTP: text, images, video and sound in and out, with a sub-model chosen per request.

    python -m serve.ernie --run RUN              on this machine
    serve deploy serve/config.yaml               on a running cluster
    POST /generate  {"input": [{"text": "a seven, top left"}], "output": "image", "budget": "small"}

Two deployments: `Front` checks requests (serve/guard.py), decodes pictures and sounds and speaks HTTP; `Model` holds one copy of
the weights (serve/ernie_model.py) and computes all requests step by step in turns (serve/ernie_turns.py, serve/ernie_runs.py).
docs/ernie_serving.md says how to run and ask it.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote

from fastapi import Depends, FastAPI, Request, Response
from fastapi.security import HTTPBearer
from ray import serve as ray_serve
from ray.exceptions import RayError
from ray.serve import Application
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.responses import StreamingResponse

from raysys.runtime.config import command_line, exits
from raysys.runtime.sentences import UserError
from raysys.systems.ernie.artifact import describe
from raysys.systems.ernie.setting import FormSetting
from serve.ernie_media import Bounds, form_of, picture, sound, stack
from serve.ernie_model import ErnieConfig, Model, Parts
from serve.ernie_models import Answer, Ask, Info
from serve.ernie_turns import Event
from serve.front import Collects
from serve.guard import DEADLINE, guarded_app
from serve.local import Here, serve_here
from serve.refusal import Refused

RAW = {"image": "image/png", "audio": "audio/wav"}
MARGIN_S = 2.0
"""Seconds before the deadline (or a quarter of it) when a stream ends itself, with a sentence; the guard can only cut it off."""
SHOWN = (
    "max_places",
    "max_tokens",
    "max_frames",
    "max_sound_frames",
    "max_characters",
    "max_media",
    "max_media_kib",
    "max_pixels",
)


class LocalConfig(ErnieConfig, Here):
    """Serve the unified model of a run on this machine, or on the cluster that --address names."""


class Front(Collects):
    """Takes HTTP requests, checks them, and asks the model."""

    def __init__(self, config: ErnieConfig, form: FormSetting, keys: Sequence[str], model: DeploymentHandle) -> None:
        super().__init__([model])
        self.config, self.keys, self.model = config, keys, model
        self.form, self.told_form = form_of(form), form

    def __serve_build_asgi_app__(self) -> FastAPI:
        app = guarded_app(
            "ERNIE in small",
            "One model for text, images, video and sound; a sub-model chosen per request.",
            self.config.guard,
            self.keys,
            self.meters,
            ready=self.ready,
            snapshots=self.snapshots,
        )
        locked = [Depends(HTTPBearer(auto_error=False, description="An API key."))] if self.keys else []
        kinds: dict[str, Any] = {
            "application/json": {},
            "image/png": {},
            "audio/wav": {},
            "application/x-ndjson": {},
            "text/event-stream": {},
        }

        @app.get("/info", dependencies=locked, summary="Model, budgets with what they cost, limits")
        async def info() -> Info:
            return await self.info()

        @app.post(
            "/generate", dependencies=locked, summary="Generate text, an image, a video or a sound", response_model=Answer,
            responses={200: {"content": kinds}},
        )  # fmt: skip
        async def generate(ask: Ask, request: Request) -> Response:
            accept = request.headers.get("accept", "")
            parts = await asyncio.to_thread(self.parts, ask)
            if ask.stream:
                return await self.streamed(ask, parts, "text/event-stream" in accept, request.scope[DEADLINE])
            return self.written(await self.answer(ask, parts), accept)

        return app

    def parts(self, ask: Ask) -> Parts:
        """The input's parts, decoded and in the model's form.

        Raises:
            Refused: there is too much, or something is no picture or sound.
        """
        c, found = self.config, list[tuple[str, Any]]()
        if (size := sum(len(part.text or "") for part in ask.input)) > c.max_characters:
            raise Refused(422, f"input: got {size} characters; at most {c.max_characters} are allowed")
        media = sum(len(part.video or ()) + (part.text is None and part.video is None) for part in ask.input)
        if media > c.max_media:
            raise Refused(422, f"input: got {media} pictures and sounds; at most {c.max_media} are allowed")
        bounds = Bounds(c.max_media_kib * 1024, c.max_pixels)
        for i, part in enumerate(ask.input):
            place = f"input.{i}"
            if part.text is not None:
                if not part.text.isascii() and any(0xD800 <= ord(letter) < 0xE000 for letter in part.text):
                    raise Refused(422, f"{place}.text: has half a character (a lone surrogate)")
                found.append(("text", part.text))
            elif part.audio is not None:
                found.append(("audio", sound(part.audio, f"{place}.audio", self.form, bounds)))
            else:
                kind = "image" if part.image is not None else "video"
                encoded = [part.image] if part.image is not None else part.video or []
                names = [f"{place}.{kind}" + f".{n}" * (kind == "video") for n in range(len(encoded))]
                frames = [picture(one, name, self.form, bounds) for one, name in zip(encoded, names, strict=True)]
                found.append((kind, stack(frames)))
        return found

    async def answer(self, ask: Ask, parts: Parts) -> Event:
        """The model's answer."""
        asked = self.model.answer.remote(ask, parts)
        try:
            answer: Event | Refused = await asked
        except asyncio.CancelledError:
            asked.cancel()  # the deadline is over, or whoever asked has gone
            raise
        if isinstance(answer, Refused):
            raise answer
        return answer

    def written(self, answer: Event, accept: str) -> Response:
        """An answer as JSON, or as the file itself where that was asked for."""
        output = answer["output"]
        if output in RAW and RAW[output] in accept:
            headers = {
                "X-Generated": "true",
                "X-Model": quote(answer["model"], safe="@"),  # headers are Latin-1, names of folders are not
                "X-Budget": answer["budget"],
                "X-Seed": str(answer["seed"]),
            }
            return Response(base64.b64decode(answer[output]), media_type=RAW[output], headers=headers)
        made = Answer.model_validate({name: value for name, value in answer.items() if name != "type"})
        return Response(made.model_dump_json(exclude_none=True), media_type="application/json")

    async def streamed(self, ask: Ask, parts: Parts, events: bool, deadline: float) -> Response:
        """An answer's parts as they are made."""
        until = deadline - min(MARGIN_S, self.config.guard.timeout_s / 4)
        asked = self.model.options(stream=True).events.remote(ask, parts)
        source = aiter(asked)
        try:
            first = await anext(source)
        except asyncio.CancelledError:
            asked.cancel()
            raise
        if isinstance(first[0], Refused):
            raise first[0]

        async def lines() -> AsyncIterator[bytes]:
            over = False
            try:
                for event in first:
                    yield line(event, events)
                while not over:
                    async with asyncio.timeout_at(until):
                        found = await anext(source)
                    over = isinstance(found[-1], Refused) or found[-1]["type"] == "done"
                    for event in found:
                        yield line(event, events)
            except TimeoutError:
                limit = f"{self.config.guard.timeout_s:g} s"
                yield line(Refused(504, f"timeout: the answer was not finished within {limit}; ask for less"), events)
            except (RayError, RayServeException, StopAsyncIteration):
                yield line(Refused(503, "busy: the model was lost while it answered; ask again later"), events)
            finally:
                if not over:
                    asked.cancel()

        return StreamingResponse(lines(), media_type="text/event-stream" if events else "application/x-ndjson")

    async def info(self) -> Info:
        """What is served, and within which limits."""
        c = self.config
        limits = {name: getattr(c, name) for name in SHOWN} | {
            "timeout_s": c.guard.timeout_s,
            "max_body_kib": c.guard.max_body_kib,
        }
        f = self.told_form
        form = {name: getattr(f, name) for name in ("frames", "channels", "height", "width", "rate", "samples")}
        return Info.model_validate(
            {**await self.model.info.remote(), "limits": limits, "form": form}, from_attributes=True
        )

    async def ready(self) -> None:
        """Return when a model replica answers; raise what keeps them if none does."""
        answers = await self.model.broadcast("snapshot").results_async(return_exceptions=True)
        if all(isinstance(one, BaseException) for one in answers):
            raise answers[0]


def line(event: Event | Refused, events: bool) -> bytes:
    """An event as a line of JSON, or as a server-sent event."""
    if isinstance(event, Refused):
        event = {"type": "error", "status": event.status, "error": event.sentence}
    written = json.dumps(event)
    return (f"data: {written}\n\n" if events else f"{written}\n").encode()


# ---------------------------------------------------------------- how it starts


def build(args: Mapping[str, Any] | ErnieConfig) -> Application:
    """The application of `import_path: serve.ernie:build`; `args` are the fields of ErnieConfig.

    Raises:
        UserError: a field is wrong, there is no key, or the run has no model.
    """
    config = args if isinstance(args, ErnieConfig) else ErnieConfig.of(args)
    if config.run is None:
        raise UserError("run: is missing; expected a run folder (path or URI) that holds ernie/ernie.json")
    keys = config.guard.digests()
    told = describe(config.run)
    if told.model is None:
        raise UserError(f"run: got {config.run}, which holds tokenizers but no model; expected a run of pretrain")
    room = config.guard.max_waiting
    # The guard refuses at `max_waiting` with a sentence; Serve's own limits lie above, so that /healthz still gets through.
    quiet = {"enable_access_log": False}  # the front's log has every request already
    model = ray_serve.deployment(max_ongoing_requests=room + 16, health_check_period_s=5, logging_config=quiet)(Model)
    front = ray_serve.deployment(
        name="Front",
        max_ongoing_requests=2 * room + 16,
        max_queued_requests=room + 16,
        ray_actor_options={"num_cpus": 0},
    )(ray_serve.ingress()(Front))
    return front.bind(config, told.form, keys, model.bind(config))


@exits
def main() -> None:
    """Serve on this machine until interrupted."""
    _, config = command_line({"serve": LocalConfig}, "serve", prog="python -m serve.ernie", description=__doc__ or "")
    assert isinstance(config, LocalConfig)
    serve_here(config, config.guard, lambda: build(config), "ernie", "/docs")


if __name__ == "__main__":
    from serve.ernie import main as start  # so that replicas import these classes by name

    start()
