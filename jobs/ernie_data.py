"""Data through the tokenizers into a run's corpus: Ray Data feeds shards to a pool of tokenizer actors.

Notable choices
- The paper runs its tokenizers as services apart from training; here they are actors, and what they make is kept, since the
  samples of an epoch are those of every other.
- A row of the pipeline is a shard to be made, which an actor reads from the source, tokenises and writes itself. So raw data and
  tensors never pass through the controller, memory holds a shard per actor, and a killed run goes on with what is missing.
- The bits of a shard depend on neither the number of actors nor whether there are any (`raysys.systems.ernie.corpus`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any, Protocol

import torch

from raysys.data.multimodal import Form, Multimodal, load_multimodal
from raysys.runtime.progress import Progress
from raysys.runtime.run import Run
from raysys.runtime.session import ClusterConfig, Session
from raysys.runtime.storage import Storage
from raysys.systems.ernie.artifact import Tokenizers, load_tokenizers
from raysys.systems.ernie.corpus import Corpus, Plan, Shard, kept, make_shard, plan

Limits = Mapping[str, int]


class Placed(Protocol):
    """A configuration that says where the job runs."""

    @property
    def cluster(self) -> ClusterConfig: ...


def tokenize(
    config: Placed, run: Run, session: Session, tokenizers: Tokenizers, data: Multimodal,
    limits: Limits | None = None, actors: int | None = None,
) -> Corpus:  # fmt: skip
    """The run's corpus, by `actors` tokenizer actors (by default one per CPU); shards that are there already are kept.

    The tokenizers are those that the run has saved (`raysys.systems.ernie.artifact.save`), which actors load themselves.

    Args:
        limits: how many items of a task are used at most.
    """
    import ray
    import ray.data  # takes seconds, and no other command needs it

    session.release()
    ray.data.DataContext.get_current().enable_progress_bars = False
    wanted = plan(tokenizers, data, limits)
    found = kept(run.storage, wanted)
    missing = [shard for shard in wanted.shards if shard.file not in found]
    if missing:
        cpus = config.cluster.cpus_per_host
        pool = actors or max(1, int(ray.cluster_resources().get("CPU", 1.0) / cpus))
        with Progress(len(wanted.shards), "tokenize", unit="shards", done=len(found)) as progress:
            for file, digest in _made(run.storage, data, wanted, missing, min(pool, len(missing)), cpus):
                found[file] = digest
                progress.advance()
    return Corpus.commit(run.storage, wanted, found)


def tokenize_here(
    config: Any, run: Run, tokenizers: Tokenizers, data: Multimodal, limits: Limits | None = None
) -> Corpus:
    """The same corpus, bit for bit, made in this process."""
    wanted = plan(tokenizers, data, limits)
    found = kept(run.storage, wanted)
    with Progress(len(wanted.shards), "tokenize", unit="shards", done=len(found)) as progress:
        for shard in wanted.shards:
            if shard.file not in found:
                items = data.train(shard.task)
                found[shard.file] = make_shard(run.storage, tokenizers, items, shard, wanted.fingerprint)
                progress.advance()
    return Corpus.commit(run.storage, wanted, found)


def _made(
    storage: Storage, data: Multimodal, wanted: Plan, missing: list[Shard], actors: int, cpus: float
) -> Iterator[tuple[str, str]]:
    """File and SHA-256 of each missing shard, as they are done."""
    import ray.data

    rows = ray.data.from_items(
        [shard._asdict() for shard in missing], override_num_blocks=min(len(missing), 8 * actors)
    )
    source = {"name": data.name, "seed": data.seed, "form": asdict(data.form)}
    stream = rows.map_batches(
        TokenizerActor, fn_constructor_kwargs={"run": storage.uri, "source": source, "fingerprint": wanted.fingerprint},
        batch_size=1, batch_format="numpy", compute=ray.data.ActorPoolStrategy(size=actors), num_cpus=cpus,
    )  # fmt: skip
    for batch in stream.iter_batches(batch_size=None, batch_format="numpy"):
        yield from zip(map(str, batch["file"]), map(str, batch["digest"]), strict=True)


class TokenizerActor:
    """An actor of Ray Data that holds tokenizers and the data's source, and makes shards."""

    def __init__(self, run: str, source: dict[str, Any], fingerprint: str) -> None:
        torch.set_num_threads(1)
        self.storage, self.fingerprint = Storage(run), fingerprint
        self.tokenizers = load_tokenizers(run)
        self.data = load_multimodal(source["name"], source["seed"], Form(**source["form"]))

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        files, digests = [], []
        for task, number, first, last in zip(
            batch["task"], batch["number"], batch["first"], batch["last"], strict=True
        ):
            shard = Shard(str(task), int(number), int(first), int(last))
            items = self.data.train(shard.task)
            digests.append(make_shard(self.storage, self.tokenizers, items, shard, self.fingerprint))
            files.append(shard.file)
        return {"file": files, "digest": digests}
