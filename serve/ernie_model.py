"""The replica that holds the unified model: one copy of the weights, sub-models as views on it, and the turns of requests.

Notable choices
- A budget is a `SubModel`: layers that are passed over and experts that are not asked. Switching it changes what is computed, and
  no byte of the weights; `raysys_ernie_weights_bytes` and the resident memory are told to see it.
- What a text token costs under each budget is measured when the replica starts, before requests come, and is what `latency_ms` is
  compared with. Under load a token takes longer; `raysys_ernie_step_seconds` has what was really taken.
- Refusals are returned, not raised: Ray logs what is raised, and a text must not get into a log.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import ray
import torch
from prometheus_client import Counter, Gauge, Histogram
from pydantic import Field
from ray import serve as ray_serve

from raysys.data.multimodal import F32
from raysys.systems.ernie.artifact import Bundle, load
from raysys.systems.ernie.elastic import SubModel
from raysys.systems.ernie.stream import Audio, Look, Sample, Segment, Special, Text, lay, window
from serve.ernie_budgets import BudgetConfig, calibrate, name_of, resident_bytes, told, weights_bytes
from serve.ernie_models import MOST_SEED, Ask
from serve.ernie_runs import Runs, Work
from serve.ernie_turns import Event, Ticket, Turns
from serve.front import AppConfig
from serve.guard import GuardConfig
from serve.meters import LATENCIES_S, Meters, Snapshot
from serve.refusal import Refused

Parts = Sequence[tuple[str, Any]]
"""Kind and content: a str, (T, C, H, W) of an image or video, (n,) of a sound."""
STEPS_S = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1, 2)
OF_KIND = {"image": ("t2i", "i2t", "t2v", "v2t"), "video": ("t2v", "v2t", "t2i", "i2t"), "audio": ("t2a", "a2t")}
"""Tasks of whose data one is enough for the tokenizer of a kind to be trained."""


class ErnieConfig(AppConfig):
    """Serve the unified model of a run."""

    guard: GuardConfig = GuardConfig(max_body_kib=8192, timeout_s=60.0)
    small: BudgetConfig = BudgetConfig(depth=0.0, active=0.25)
    """The sub-model `small`."""
    medium: BudgetConfig = BudgetConfig(depth=0.5, active=0.5)
    """The sub-model `medium`; `full` is the whole model."""
    max_places: int = Field(512, ge=32, le=65_536)
    """Places of a row: tokens of the input and what is generated."""
    max_tokens: int = Field(256, ge=1, le=65_536)
    """Tokens of a text at most; also what is taken by default."""
    max_frames: int = Field(16, ge=1, le=64)
    """Frames of a video at most; by default as many as the training data has."""
    max_sound_frames: int = Field(128, ge=1, le=4096)
    """Frames of a sound at most; by default as long as those of the training data."""
    max_characters: int = Field(8000, ge=1, le=1_000_000)
    """Characters of all texts of a request at most."""
    max_media: int = Field(32, ge=1, le=1024)
    """Pictures and sounds of a request at most, frames of videos counted."""
    max_media_kib: int = Field(1024, ge=1, le=65_536)
    """Size of a picture or sound at most, in KiB."""
    max_pixels: int = Field(4_194_304, ge=64, le=1 << 28)
    """Pixels of a picture at most, before it is resized."""
    max_runs: int = Field(4, ge=1, le=256)
    """Generations under way at once; each has a cache. Others wait."""
    max_batch: int = Field(8, ge=1, le=256)
    """Texts of a generation at most: those that wait together and have the same budget and temperature."""


class ModelMeters(Meters):
    """Metrics of a model replica."""

    def __init__(self) -> None:
        super().__init__()
        own = self.registry
        self.made = Counter(
            "raysys_ernie_made", "Text tokens, picture frames and sound frames.", ["output", "budget"], registry=own
        )
        self.step = Histogram(
            "raysys_ernie_step_seconds", "Time of a step: a token of every text of a batch, a scale, a frame of sound.",
            ["output", "budget"], buckets=STEPS_S, registry=own,
        )  # fmt: skip
        self.batch = Histogram("raysys_ernie_batch_size", "Texts in a step.", buckets=(1, 2, 4, 8, 16), registry=own)
        self.first = Histogram(
            "raysys_ernie_first_seconds", "From a request to its first event.", buckets=LATENCIES_S, registry=own
        )
        self.gone = Counter("raysys_ernie_abandoned", "Requests whose asker went before the end.", registry=own)
        self.waiting = Gauge("raysys_ernie_waiting", "Requests that wait for a place.", registry=own)
        self.runs = Gauge("raysys_ernie_runs", "Generations under way.", registry=own)
        self.weights = Gauge("raysys_ernie_weights_bytes", "Weights in memory, each counted once.", registry=own)
        self.resident = Gauge("raysys_ernie_resident_bytes", "Resident memory of the replica.", registry=own)


class Holder:
    """A run's model and its sub-models, ready to be asked; without Ray. Generations are begun with `enter`."""

    def __init__(self, config: ErnieConfig, bundle: Bundle, name: str, threads: int = 1) -> None:
        self.config, self.bundle, self.name = config, bundle, name
        self.meters = ModelMeters()
        torch.set_num_threads(threads)
        model = bundle.model
        full = SubModel.full(model.setting)
        views = {n: getattr(config, n).sub(model.setting, model.levels) for n in ("small", "medium")}
        self.subs: dict[str, SubModel | None] = {**views, "full": None}
        measured = calibrate(bundle, self.subs)
        self.budgets = {n: told(bundle, sub or full, measured[n]) for n, sub in self.subs.items()}
        runs = Runs(bundle, name, self._meter)
        self.turns = Turns(runs.begin, runs.key, config.max_runs, config.max_batch, partial(_prepare, threads))

    def _meter(self, work: Work, made: int, seconds: float) -> None:
        self.meters.made.labels(work.output, work.budget).inc(made)
        self.meters.step.labels(work.output, work.budget).observe(seconds)
        if work.output == "text":
            self.meters.batch.observe(made)

    def budget(self, ask: Ask) -> str:
        """The name of the sub-model that a request gets.

        Raises:
            Refused: there is none of that name, or none is that fast.
        """
        if ask.latency_ms is not None:
            fits = [(b.mflops, name) for name, b in self.budgets.items() if b.token_ms <= ask.latency_ms]
            if not fits:
                least = min(b.token_ms for b in self.budgets.values())
                raise Refused(
                    422, f"latency_ms: got {ask.latency_ms:g}; the fastest sub-model takes {least:.3g} ms a token"
                )
            return max(fits)[1]
        name = "full" if ask.budget is None else ask.budget
        if name not in self.subs:
            raise Refused(422, f"budget: got {name!r}; expected one of {', '.join(self.subs)}")
        return name

    @torch.no_grad()
    def work(self, ask: Ask, parts: Parts) -> Work:
        """A request, checked against the model and put into tokens.

        Raises:
            Refused: it is longer than a row, or asks for what the model has not learned or cannot do.
        """
        c, b, s = self.config, self.bundle, self.bundle.model.sizes
        for kind in {ask.output, *(kind for kind, _ in parts)} & set(OF_KIND):
            if not set(OF_KIND[kind]) & set(b.tasks):
                raise Refused(422, f"output or input: got {kind}; this model was trained without any")
        first = [content for kind, content in parts if kind in ("image", "video")] if ask.output == "video" else []
        segments = [self._segment(k, content) for k, content in parts if not (first and k in ("image", "video"))]
        prompt = Sample({"image": "t2i", "video": "t2v", "audio": "t2a"}.get(ask.output, "lm"), tuple(segments))
        opened, given, room = Special.SEP, None, 0
        if ask.output == "text":
            limit = room = self._limit("max_tokens", ask.max_tokens, c.max_tokens, c.max_tokens)
            if ask.continue_text:
                opened = None
        elif ask.output == "audio":
            usual = min(c.max_sound_frames, b.form.samples // b.audio.setting.hop)
            opened, limit = Special.BOA, self._limit("frames", ask.frames, usual, c.max_sound_frames)
            room = limit
        else:
            usual = min(c.max_frames, b.form.frames)
            count = 1 if ask.output == "image" else self._limit("frames", ask.frames, usual, c.max_frames)
            given = self._given(np.concatenate(first), count) if first else None
            limit = self._latent(count)
            room = limit * (sum(h * w for h, w in s.scales[1:]) + s.scales[-1][0] * s.scales[-1][1])
            opened = Special.BOV if limit > 1 else Special.BOI
        places = len(lay(prompt, s.scales, opened)) + room
        if places > c.max_places:
            raise Refused(422, f"input: needs {places - room} places and the output {room}; a row has {c.max_places}")
        name = self.budget(ask)
        seed = secrets.randbelow(MOST_SEED) if ask.seed is None else ask.seed
        return Work(
            ask.output,
            prompt,
            limit,
            ask.temperature,
            seed,
            name,
            self.subs[name],
            ask.guidance,
            given,
            opened,
            ask.stream,
        )

    def _segment(self, kind: str, content: Any) -> Segment:
        b = self.bundle
        if kind == "text":
            return Text(b.text.encode(content), False)
        if kind == "audio":
            hop = b.audio.setting.hop
            wave = np.pad(content, (0, -len(content) % hop))
            return Audio(b.audio.encode(torch.from_numpy(wave)[None])[0].numpy(), False)
        try:
            window(len(content))
        except ValueError as error:
            raise Refused(422, f"video: {error}") from error
        return Look(b.visual.features(torch.from_numpy(content)[None])[0].numpy(), content)

    def _limit(self, field: str, asked: int | None, usual: int, most: int) -> int:
        if asked is not None and asked > most:
            raise Refused(422, f"{field}: got {asked}; at most {most} are allowed")
        return asked or usual

    def _given(self, frames: F32, count: int) -> torch.Tensor:
        if len(frames) >= count:
            raise Refused(
                422, f"frames: got {count}, and {len(frames)} first ones; expected more frames than are given"
            )
        self._latent(len(frames))
        return self.bundle.visual.encode(torch.from_numpy(frames)[None])

    def _latent(self, frames: int) -> int:
        try:
            return self.bundle.visual.latent_frames(frames)
        except ValueError as error:
            raise Refused(422, str(error)) from error

    def snapshot(self) -> Snapshot:
        """The metrics now."""
        waiting, runs = self.turns.counts
        self.meters.waiting.set(waiting)
        self.meters.runs.set(runs)
        self.meters.weights.set(weights_bytes(self.bundle))
        self.meters.resident.set(resident_bytes())
        return self.meters.snapshot()


class Model:
    """The deployment around a Holder."""

    def __init__(self, config: ErnieConfig) -> None:
        assert config.run is not None
        threads = max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1)))
        torch.set_num_threads(threads)
        self.held = Holder(config, load(config.run), name_of(config.run), threads)

    async def events(self, ask: Ask, parts: Parts) -> AsyncIterator[list[Event | Refused]]:
        """What is made of a request, as it is made: first that it was accepted, or why not. Closing it stops the work."""
        held, loop = self.held, asyncio.get_running_loop()
        queue: asyncio.Queue[Event | Refused] = asyncio.Queue()
        began, over = time.perf_counter(), False
        try:
            work = await asyncio.to_thread(held.work, ask, parts)
        except Refused as refused:
            yield [refused]
            return
        ticket = Ticket(work, lambda event: loop.call_soon_threadsafe(queue.put_nowait, event) and None)
        held.turns.enter(ticket)
        try:
            yield [{"type": "start", "model": held.name, "budget": work.budget, "seed": work.seed, "generated": True}]
            while not over:
                found = [await queue.get()]
                if began:
                    held.meters.first.observe(time.perf_counter() - began)
                    began = 0.0
                while not queue.empty():
                    found.append(queue.get_nowait())
                over = isinstance(found[-1], Refused) or found[-1]["type"] == "done"
                yield found
        finally:
            ticket.gone = True
            if not over:
                held.meters.gone.inc()

    async def answer(self, ask: Ask, parts: Parts) -> Event | Refused:
        """The whole answer."""
        last: Event | Refused = Refused(500, "app: the generation ended without an answer")
        async for found in self.events(ask, parts):
            last = found[-1]
        return last

    async def info(self) -> dict[str, Any]:
        """Model and budgets."""
        held, b = self.held, self.held.bundle
        return {
            "model": held.name, "tasks": list(b.tasks), "data": b.data, "licence": b.licence, "budgets": held.budgets,
            "weights_bytes": weights_bytes(b),
        }  # fmt: skip

    async def snapshot(self) -> tuple[str, Snapshot]:
        """This replica's name and metrics."""
        return ray_serve.get_replica_context().replica_tag, self.held.snapshot()

    async def check_health(self) -> None:
        """Called by Serve now and then."""
        if not self.held.turns.alive:
            raise RuntimeError("the thread that computes has ended")


def _prepare(threads: int) -> None:
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)  # of this thread
