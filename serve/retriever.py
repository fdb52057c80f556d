"""Search by a distilled retriever over an index that can be changed while it is searched, as a Ray Serve application.

    python -m serve.retriever --run RUN --index ROOT     on this machine
    serve deploy serve/config.yaml                       on a running cluster
    POST /search  {"query": "...", "k": 10}

Deployments: `Front` checks requests (serve/guard.py), gathers queries that come together, and merges; `Encoder` holds the
retriever; `Shard0`, `Shard1`, ... each own a part of the index and its journal (serve/collection.py). The queries at hand go in
one call to an encoder, and in one to each shard. docs/retriever_serving.md says how to run and query it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from fastapi import Depends, FastAPI, Response
from fastapi.security import HTTPBearer
from pydantic import Field
from ray import serve as ray_serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from raysys.runtime.config import command_line, exits
from raysys.runtime.sentences import UserError
from raysys.systems.rabtriever.index import EF
from raysys.systems.rabtriever.versions import Root
from serve import page
from serve.batching import Gatherer
from serve.collection import Collection, Hits, told
from serve.encoder import Encoder, Load, load_artifact, mismatch
from serve.front import AppConfig, Collects
from serve.guard import guarded_app
from serve.local import Here, serve_here
from serve.refusal import Refused
from serve.search_models import Answers, Documents, Found, Id, Index, Queries, Query, Result, Started, Stored, written
from serve.shard import Shard


class RetrieverConfig(AppConfig):
    """Serve the retriever of a run over an index."""

    index: str | None = None
    """Folder of the index (python -m jobs.rabtriever index), on a disk that all shards can reach."""
    max_batch: int = Field(32, ge=1, le=1024)
    """Queries computed together at most."""
    max_k: int = Field(100, ge=1, le=10_000)
    """Documents per query at most."""
    max_rerank: int = Field(20, ge=1, le=1000)
    """Documents per query that the teacher may be asked about."""
    max_pairs: int = Field(60, ge=1, le=100_000)
    """Documents of all queries of a request that the teacher may be asked about."""
    max_texts: int = Field(64, ge=1, le=10_000)
    """Queries, or documents, in one request at most."""
    max_characters: int = Field(4000, ge=1, le=1_000_000)
    """Characters of a query or document at most."""
    ef: int = Field(EF, ge=1, le=100_000)
    """Candidates that a search of kind hnsw looks at: more find more of the best, and take longer."""
    reload_s: float = Field(5.0, gt=0, le=86_400)
    """How often to look for a version that was published."""
    shard_timeout_s: float = Field(5.0, gt=0, le=3600)
    """A shard that does not answer by then is away: 503, never a part of the results."""


class LocalConfig(RetrieverConfig, Here):
    """Serve the retriever of a run on this machine, or on the cluster that --address names."""


class Front(Collects):
    """Takes HTTP requests, checks them, and asks encoders and shards."""

    def __init__(
        self,
        config: RetrieverConfig,
        root: Root,
        keys: Sequence[str],
        encoder: DeploymentHandle,
        shards: list[DeploymentHandle],
    ) -> None:
        super().__init__([encoder, *shards])
        self.config, self.keys, self.encoder = config, keys, encoder
        self.collection = Collection(root, shards, config.shard_timeout_s, config.reload_s)
        self.hits: Gatherer[Query, Hits] = Gatherer(self._hits, config.max_batch)

    def __serve_build_asgi_app__(self) -> FastAPI:
        app = guarded_app(
            "Retriever",
            "Documents by whether they are a right response to a query, as a generative reranker would judge them.",
            self.config.guard,
            self.keys,
            self.meters,
            ready=self.ready,
            snapshots=self.snapshots,
            also_open=("/",),
        )
        locked = [Depends(HTTPBearer(auto_error=False, description="An API key."))] if self.keys else []
        page.add(app, bool(self.keys))

        @app.post("/search", dependencies=locked, summary="Documents for a query", response_model=Found)
        async def search(query: Query) -> Response:
            return written((await self.search([query]))[0])

        @app.post("/search:batch", dependencies=locked, summary="Documents for several queries", response_model=Answers)
        async def search_batch(queries: Queries) -> Response:
            return written(Answers(answers=await self.search(queries.requests)))

        @app.post("/documents", dependencies=locked, summary="Add documents, or replace them; durable when answered")
        async def put(documents: Documents) -> Stored:
            return await self.put(documents)

        @app.get("/documents/{id:path}", dependencies=locked, summary="The text of a document")
        async def get(id: Id) -> dict[str, str]:
            return {"id": id, "text": await self.collection.text(id)}

        @app.delete("/documents/{id:path}", dependencies=locked, summary="Delete a document; durable when answered")
        async def delete(id: Id) -> dict[str, str]:
            await self.collection.delete(id)
            return {"id": id}

        @app.get("/index", dependencies=locked, summary="What is searched")
        async def index() -> Index:
            return await self.collection.index()

        @app.post("/index:reload", dependencies=locked, summary="Go over to the published version now")
        async def reload() -> Index:
            await self.collection.reload()
            return await self.collection.index()

        @app.post("/index:compact", dependencies=locked, summary="Fold all changes into a new version", status_code=202)
        async def compact() -> Started:
            return await self.collection.compact()

        return app

    # ------------------------------------------------------------ search

    async def search(self, queries: Sequence[Query]) -> list[Found]:
        """The answers, in order."""
        began = time.perf_counter()
        c = self.config
        self.few(len(queries), "requests")
        for query in queries:
            self.short(query.query, "query")
            most = c.max_rerank if query.rerank else c.max_k
            if query.k > most:
                raise Refused(422, f"k: got {query.k}; at most {most} are allowed{' with rerank' * query.rerank}")
        if (pairs := sum(query.k for query in queries if query.rerank)) > c.max_pairs:
            raise Refused(422, f"rerank: got {pairs} documents in all; at most {c.max_pairs} are allowed in a request")
        found = await asyncio.gather(*map(self.hits, queries))
        results = await asyncio.gather(*map(self._worded, queries, found))
        took = time.perf_counter() - began
        return [Found(results=r, version=f.version, seconds=took) for r, f in zip(results, found, strict=True)]

    async def _worded(self, query: Query, hits: Hits) -> list[Result]:
        teacher: Sequence[float | None] = [None] * len(hits.ids)
        prompts: Sequence[str | None] = teacher  # type: ignore[assignment]
        if query.rerank and hits.ids:
            teacher = await told(self.encoder.rerank.remote(query.query, hits.texts))
        if query.explain:
            prompts = await told(self.encoder.prompts.remote(query.query, hits.texts))
        rows = zip(hits.ids, hits.scores, hits.texts, teacher, prompts, strict=True)
        results = [
            Result(id=id, score=x, probability=sigmoid(x), text=text, teacher=t, prompt=p) for id, x, text, t, p in rows
        ]
        return sorted(results, key=lambda one: -(one.teacher or 0.0)) if query.rerank else results

    async def _hits(self, queries: list[Query]) -> list[Hits | Refused]:
        """What all shards have for queries that came together: one call to an encoder, and one to each shard."""
        u, constants = await told(self.encoder.queries.remote([query.query for query in queries]))
        rows = [
            i for i, c in enumerate(constants) if not isinstance(c, Refused)
        ]  # what has no vector ties with everything
        found = await self.collection.search(u[rows], [queries[i].k for i in rows]) if rows else []
        answers: list[Hits | Refused] = list(constants)
        for i, hits in zip(rows, found, strict=True):
            answers[i] = hits._replace(scores=[score + constants[i] for score in hits.scores])
        return answers

    # ------------------------------------------------------------ documents

    async def put(self, documents: Documents) -> Stored:
        """Make documents durable in their shards."""
        asked = documents.documents
        self.few(len(asked), "documents")
        for document in asked:
            self.short(document.text, "text")
        if len({one.id for one in asked}) < len(asked):
            raise Refused(422, "documents: an id is there twice; expected every id once")
        z = await told(self.encoder.documents.remote([one.text for one in asked]))
        await self.collection.put([one.id for one in asked], [one.text for one in asked], z)
        return Stored(documents=len(asked))

    def few(self, count: int, field: str) -> None:
        """Raise Refused where there is too much in a request."""
        if count > self.config.max_texts:
            raise Refused(422, f"{field}: got {count}; at most {self.config.max_texts} are allowed")

    def short(self, text: str, field: str) -> None:
        """Raise Refused where a text is too long."""
        if len(text) > self.config.max_characters:
            raise Refused(422, f"{field}: got {len(text)} characters; at most {self.config.max_characters} are allowed")

    # ------------------------------------------------------------ operation

    async def ready(self) -> None:
        """Return when an encoder and every shard answer; raise what keeps them if not."""
        answers = await self.encoder.broadcast("snapshot").results_async(return_exceptions=True)
        if all(isinstance(one, BaseException) for one in answers):
            raise answers[0]
        await self.collection.all_shards("facts")

    async def check_health(self) -> None:
        """Called by Serve now and then."""
        self.collection.watch()


def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)) without overflow."""
    return float(0.5 * (1 + np.tanh(0.5 * x)))


# ---------------------------------------------------------------- how it starts


def build(args: Mapping[str, Any] | RetrieverConfig, load: Load = load_artifact) -> Application:
    """The application of `import_path: serve.retriever:build`; `args` are the fields of RetrieverConfig.

    Raises:
        UserError: a field is wrong, there is no key, no index, no retriever, or they do not fit each other.
    """
    config = args if isinstance(args, RetrieverConfig) else RetrieverConfig.of(args)
    if config.run is None:
        raise UserError("run: is missing; expected a run folder (path or URI) that holds retriever/")
    if config.index is None:
        raise UserError(
            "index: is missing; expected the folder of an index, build one with python -m jobs.rabtriever index"
        )
    keys = config.guard.digests()
    root = Root.open(config.index)
    root.check(root.current())
    found = load(config.run, "cpu").fingerprint
    if found != root.fingerprint:
        raise UserError(mismatch(config.run, found, root.fingerprint))
    room = config.guard.max_waiting
    # The guard refuses at `max_waiting` with a sentence; Serve's own limits lie above, so that /healthz still gets through.
    quiet = {"enable_access_log": False}  # the front's log has every request already
    encoder = ray_serve.deployment(max_ongoing_requests=room + 16, health_check_period_s=5, logging_config=quiet)(
        Encoder
    )
    shard = ray_serve.deployment(
        max_ongoing_requests=4 * room + 16,
        health_check_period_s=2,
        health_check_timeout_s=30,
        logging_config=quiet,
        ray_actor_options={"num_cpus": 0.5},
    )(Shard)
    others = [shard.options(name=f"Shard{s}").bind(str(root.folder), s, config.ef) for s in range(1, root.shards)]
    shards = [shard.options(name="Shard0").bind(str(root.folder), 0, config.ef, others), *others]
    front = ray_serve.deployment(
        name="Front",
        max_ongoing_requests=2 * room + 16,
        max_queued_requests=room,
        health_check_period_s=5,
        ray_actor_options={"num_cpus": 0},
    )(ray_serve.ingress()(Front))
    return front.bind(config, root, keys, encoder.bind(config.run, root.fingerprint, config.max_batch, load), shards)


@exits
def main() -> None:
    """Serve on this machine until interrupted."""
    _, config = command_line(
        {"serve": LocalConfig}, "serve", prog="python -m serve.retriever", description=__doc__ or ""
    )
    assert isinstance(config, LocalConfig)
    serve_here(config, config.guard, lambda: build(config), "retriever", "/")


if __name__ == "__main__":
    from serve.retriever import main as start  # so that replicas import these classes by name

    start()
