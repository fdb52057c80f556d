"""Text classification with many LoRA adapters on one frozen model, as a Ray Serve application.

    python -m serve.adapters --run RUN          on this machine
    serve deploy serve/config.yaml              on a running cluster
    POST /classify  {"text": "...", "adapter": "consensus"}

Two deployments: `Front` checks requests (serve/guard.py) and speaks HTTP, `Model` holds the model, loads adapters when they are
first asked for, and computes one batch at a time, with as many adapters in it as there are texts. Each can have several replicas
(`deployments:` in serve/config.yaml). docs/serving.md says how to run and query it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray
import torch
from fastapi import Depends, FastAPI
from fastapi.security import HTTPBearer
from prometheus_client import Counter, Gauge, Histogram
from pydantic import Field
from ray import serve as ray_serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from raysys.runtime.config import command_line, exits
from raysys.runtime.sentences import UserError
from serve.batching import Batcher, Lazy
from serve.front import AppConfig, Collects
from serve.guard import guarded_app
from serve.local import Here, serve_here
from serve.meters import LATENCIES_S, Meters, Snapshot
from serve.questions import Answer, Answers, Listing, Question, Questions
from serve.refusal import Refused
from serve.stack import Artifact, Factors, Item, Stack

Ask = tuple[str, str | None, str]
"""text, second text, adapter: as `Model.classify` takes it."""
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class AdaptersConfig(AppConfig):
    """Serve the adapters of a run."""

    model: str | None = None
    """Base model to load instead of the one that classifier.json names: `minilm`, a folder, or a Hugging Face id."""
    max_batch: int = Field(32, ge=1, le=4096)
    """Texts in one forward pass at most."""
    batch_wait_ms: float = Field(4.0, ge=0, le=10_000)
    """How long the first text of a batch waits for company while the model is idle."""
    max_adapters: int = Field(256, ge=1, le=1_000_000)
    """Adapters that one model replica keeps in memory; those not used for longest go first."""
    max_texts: int = Field(256, ge=1, le=100_000)
    """Texts in one request to /classify:batch at most."""


class LocalConfig(AdaptersConfig, Here):
    """Serve the adapters of a run on this machine, or on the cluster that --address names."""


# ---------------------------------------------------------------- the model


class ModelMeters(Meters):
    """Metrics of a model replica."""

    def __init__(self) -> None:
        super().__init__()
        own = self.registry
        self.batch = Histogram("raysys_batch_size", "Texts in a forward pass.", buckets=SIZES, registry=own)
        self.mixed = Histogram(
            "raysys_batch_adapters", "Different adapters in a forward pass.", buckets=SIZES, registry=own
        )
        self.forward = Histogram("raysys_forward_seconds", "Time of a forward pass.", buckets=LATENCIES_S, registry=own)
        self.loads = Counter("raysys_adapter_loads", "Adapters read from storage.", ["result"], registry=own)
        self.loaded = Gauge("raysys_adapters_loaded", "Adapters in memory.", registry=own)


class Model:
    """The base model, the adapters in memory, and the queue of texts in front of them."""

    def __init__(self, config: AdaptersConfig) -> None:
        assert config.run is not None
        context = ray.get_runtime_context()
        torch.set_num_threads(max(1, int(context.get_assigned_resources().get("CPU", 1))))
        self.meters = ModelMeters()
        self.stack = Stack(config.run, config.model, "cuda" if context.get_accelerator_ids().get("GPU") else "cpu")
        self.adapters: Lazy[str, Factors] = Lazy(self._read, config.max_adapters)
        self.answer: Batcher[Item, list[float]] = Batcher(self._forward, config.max_batch, config.batch_wait_ms / 1e3)

    def _read(self, name: str) -> Factors:
        try:
            factors = self.stack.read(name)
        except Refused as refused:
            self.meters.loads.labels("unknown" if refused.status == 404 else "refused").inc()
            raise
        self.meters.loads.labels("loaded").inc()
        return factors

    def _forward(self, items: list[Item]) -> list[list[float]]:
        began = time.perf_counter()
        rows = self.stack.probabilities(items)
        self.meters.forward.observe(time.perf_counter() - began)
        self.meters.batch.observe(len(items))
        self.meters.mixed.observe(len({id(item.factors.a) for item in items}))
        return rows

    async def classify(self, asks: Sequence[Ask]) -> list[list[float]] | Refused:
        """(n, C) probabilities of texts under their adapters. A refusal is returned, not raised: Ray logs what is raised."""
        try:
            names = list(dict.fromkeys(adapter for _, _, adapter in asks))
            factors = dict(zip(names, await asyncio.gather(*map(self.adapters, names)), strict=True))
        except Refused as refused:
            return refused
        items = [Item(text, second, factors[adapter]) for text, second, adapter in asks]
        return await asyncio.gather(*map(self.answer, items))

    async def listing(self) -> Listing:
        """The adapters that are in the run's folder now, and what they classify."""
        names = await asyncio.to_thread(self.stack.artifact.names)
        c = self.stack.classifier
        return Listing(adapters=names, labels=c.labels, pair=c.pair, model=self.stack.base.name)

    async def snapshot(self) -> tuple[str, Snapshot]:
        """This replica's name and metrics."""
        self.meters.loaded.set(len(self.adapters))
        return ray_serve.get_replica_context().replica_tag, self.meters.snapshot()


# ---------------------------------------------------------------- the front


class Front(Collects):
    """Takes HTTP requests, checks them, and asks a model replica."""

    def __init__(
        self, config: AdaptersConfig, labels: list[str], pair: bool, keys: Sequence[str], model: DeploymentHandle
    ):
        super().__init__([model])
        self.config, self.labels, self.pair, self.keys, self.model = config, labels, pair, keys, model

    def __serve_build_asgi_app__(self) -> FastAPI:
        app = guarded_app(
            "Adapters",
            "Text classification with many LoRA adapters on one frozen model.",
            self.config.guard,
            self.keys,
            self.meters,
            ready=self.ready,
            snapshots=self.snapshots,
        )
        locked = [Depends(HTTPBearer(auto_error=False, description="An API key."))] if self.keys else []

        @app.get("/adapters", dependencies=locked, summary="Adapters and labels that are served")
        async def adapters() -> Listing:
            return await self.model.listing.remote()

        @app.post("/classify", dependencies=locked, summary="Classify a text with an adapter")
        async def classify(question: Question) -> Answer:
            return (await self.ask([question]))[0]

        @app.post("/classify:batch", dependencies=locked, summary="Classify texts, each with its own adapter")
        async def classify_batch(questions: Questions) -> Answers:
            if len(questions.requests) > self.config.max_texts:
                raise Refused(
                    422, f"requests: got {len(questions.requests)} texts; at most {self.config.max_texts} are allowed"
                )
            return Answers(answers=await self.ask(questions.requests))

        return app

    async def ready(self) -> None:
        """Return when a model replica answers; raise what keeps them if none does."""
        told = await self.model.broadcast("snapshot").results_async(return_exceptions=True)
        if all(isinstance(one, BaseException) for one in told):
            raise told[0]

    async def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """The model's answers, in order."""
        for question in questions:
            if (question.second is not None) != self.pair:
                raise Refused(
                    422,
                    "second: is missing; this classifier takes pairs of texts"
                    if self.pair
                    else "second: got a text; this classifier takes single texts",
                )
        asked = self.model.classify.remote([(q.text, q.second, q.adapter) for q in questions])
        try:
            rows = await asked
        except asyncio.CancelledError:
            asked.cancel()  # the deadline is over, or whoever asked has gone
            raise
        if isinstance(rows, Refused):
            raise rows
        return [self.worded(question.adapter, row) for question, row in zip(questions, rows, strict=True)]

    def worded(self, adapter: str, row: Sequence[float]) -> Answer:
        """Probabilities (C,) with the labels' names."""
        probabilities = dict(zip(self.labels, row, strict=True))
        return Answer(
            label=max(probabilities, key=probabilities.__getitem__), probabilities=probabilities, adapter=adapter
        )


# ---------------------------------------------------------------- how it starts


def build(args: Mapping[str, Any] | AdaptersConfig) -> Application:
    """The application of `import_path: serve.adapters:build`; `args` are the fields of AdaptersConfig.

    Raises:
        UserError: a field is wrong, there is no key, or the run has no adapters.
    """
    config = args if isinstance(args, AdaptersConfig) else AdaptersConfig.of(args)
    if config.run is None:
        raise UserError("run: is missing; expected a run folder (path or URI) that holds adapters/classifier.json")
    keys = config.guard.digests()
    artifact = Artifact(config.run)
    classifier = artifact.classifier()
    if not artifact.names():
        raise UserError(f"run: got {config.run}; {artifact.storage.uri} holds no adapters")
    room = config.guard.max_waiting
    # The guard refuses at `max_waiting` with a sentence; Serve's own limits lie above, so that /healthz still gets through.
    quiet = {"enable_access_log": False}  # the front's log has every request already
    model = ray_serve.deployment(max_ongoing_requests=room + 16, health_check_period_s=5, logging_config=quiet)(Model)
    front = ray_serve.deployment(
        name="Front",
        max_ongoing_requests=2 * room + 16,
        max_queued_requests=room,
        ray_actor_options={"num_cpus": 0},
    )(ray_serve.ingress()(Front))
    return front.bind(config, classifier.labels, classifier.pair, keys, model.bind(config))


@exits
def main() -> None:
    """Serve on this machine until interrupted."""
    _, config = command_line(
        {"serve": LocalConfig}, "serve", prog="python -m serve.adapters", description=__doc__ or ""
    )
    assert isinstance(config, LocalConfig)
    serve_here(config, config.guard, lambda: build(config), "adapters", "/docs")


if __name__ == "__main__":
    from serve.adapters import main as start  # so that replicas import these classes by name

    start()
