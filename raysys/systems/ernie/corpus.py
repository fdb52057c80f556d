"""Data as samples: items through the tokenizers, in shards of a run's storage, read back one by one.

    corpus/corpus.json                        what there is: items of each task, SHA-256 of every shard
    corpus/t2i-00003.safetensors              samples 3 * size to 4 * size - 1 of a task

Notable choices
- A shard is the unit of everything: who makes it, when, and how many are made at once does not matter, since its items, its
  batches and the order inside it are fixed. So a corpus has the same bits however it was made (on the same kind of processor).
- The description comes last. Before it there is no corpus, and shards found then are kept if they are whole and were made by
  the same tokenizers from the same data (its name, seed, form and number of items; files are not compared).
- Latents are stored before quantisation, since flips and targets are drawn anew in every epoch. What is looked at is stored in
  half precision: nothing is predicted from its last bits.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray

from raysys.data.multimodal import Lazy, Multimodal
from raysys.runtime.checkpoint import CheckpointError, read_state, write_state
from raysys.runtime.sentences import UserError
from raysys.runtime.storage import Storage
from raysys.systems.ernie.samples import BATCH, Codecs, fingerprint, samples_of
from raysys.systems.ernie.stream import Audio, Look, Sample, Segment, Text, Vision

FOLDER = "corpus"
FORMAT = 1
SIZE = 256
"""Samples of a shard."""
WINDOW = 4
"""Shards of a task that training reads at the same time (`learner.shuffled`)."""
CACHE = 1 << 29
"""Bytes of shards that an open corpus keeps in memory, and a window of each task whatever it weighs."""


class Shard(NamedTuple):
    """Items first to last - 1 of a task's training split."""

    task: str
    number: int
    first: int
    last: int

    @property
    def file(self) -> str:
        return f"{FOLDER}/{self.task}-{self.number:05d}.safetensors"


class Plan(NamedTuple):
    """What a corpus is to consist of. `fingerprint` is that of data and tokenizers."""

    shards: tuple[Shard, ...]
    sizes: dict[str, int]
    fingerprint: str


def plan(codecs: Codecs, data: Multimodal, limits: Mapping[str, int] | None = None, size: int = SIZE) -> Plan:
    """The shards of a data set's training items; `limits` says how many of a task are used at most."""
    shards, sizes = list[Shard](), dict[str, int]()
    for task in data.tasks:
        sizes[task] = min(len(data.train(task)), (limits or {}).get(task, 1 << 62))
        for number, first in enumerate(range(0, sizes[task], size)):
            shards.append(Shard(task, number, first, min(first + size, sizes[task])))
    form = {name: getattr(data.form, name) for name in data.form.__dataclass_fields__}
    told = [FORMAT, data.name, data.seed, form, sizes, size, BATCH, fingerprint(codecs)]
    return Plan(tuple(shards), sizes, hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest())


def make_shard(storage: Storage, codecs: Codecs, items: Lazy, shard: Shard, fingerprint: str) -> str:
    """Tokenise and write a shard; returns the SHA-256 of its file. `items` are the task's training items."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums over more threads may have other last bits
    try:
        samples = samples_of(codecs, list(items[shard.first : shard.last]))
    finally:
        torch.set_num_threads(threads)
    return write_shard(storage, shard, samples, fingerprint)


def write_shard(storage: Storage, shard: Shard, samples: Sequence[Sample], fingerprint: str) -> str:
    """Write samples, which are of one task and alike in their segments; returns the SHA-256 of the file."""
    kinds = {tuple(json.dumps(_fixed(s), sort_keys=True) for s in sample.segments) for sample in samples}
    if len(samples) != shard.last - shard.first or len(kinds) != 1 or {s.task for s in samples} != {shard.task}:
        raise ValueError(
            f"a shard has samples of one task and form, got {len(samples)} of {len(kinds)} forms for {shard}"
        )
    arrays: dict[str, NDArray[Any]] = {}
    for j, segment in enumerate(samples[0].segments):
        for name, dtype in STORED[type(segment)].items():
            values = [getattr(sample.segments[j], name) for sample in samples]
            arrays[f"{j}.{name}"] = np.concatenate(values).astype(dtype)
            arrays[f"{j}.{name}.ends"] = np.cumsum([len(value) for value in values])
    meta = {
        "task": shard.task, "number": shard.number, "count": len(samples), "fingerprint": fingerprint,
        "segments": [_fixed(segment) for segment in samples[0].segments],
    }  # fmt: skip
    return write_state(storage, shard.file, arrays, meta)


def read_shard(storage: Storage, file: str, digest: str | None = None) -> tuple[list[Sample], dict[str, Any]]:
    """Samples of a shard and what its file says of it; CheckpointError if it is damaged."""
    arrays, meta = read_state(storage, file, digest)
    try:
        columns = [
            {
                name: np.split(arrays[f"{j}.{name}"], arrays[f"{j}.{name}.ends"][:-1])
                for name in STORED[KINDS[told["kind"]]]
            }
            for j, told in enumerate(meta["segments"])
        ]
        fixed = [(KINDS[told["kind"]], {k: v for k, v in told.items() if k != "kind"}) for told in meta["segments"]]
        samples = [
            Sample(
                meta["task"],
                tuple(_segment(kind, rest, column, i) for (kind, rest), column in zip(fixed, columns, strict=True)),
            )
            for i in range(meta["count"])
        ]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file} is no shard of samples ({error or type(error).__name__})") from error
    return samples, meta


def kept(storage: Storage, plan: Plan) -> dict[str, str]:
    """Shards of the plan that are there, whole and of its fingerprint: file name -> SHA-256."""
    if storage.exists(f"{FOLDER}/corpus.json"):
        done = Corpus.open(storage)
        if done.fingerprint == plan.fingerprint:
            return dict(done.digests)
    found = {}
    there = set(storage.files(FOLDER))
    for shard in plan.shards:
        if shard.file not in there:
            continue
        try:
            samples, meta = read_shard(storage, shard.file)
        except CheckpointError:
            storage.delete(shard.file)  # it will be made again
            continue
        if meta["fingerprint"] == plan.fingerprint and len(samples) == shard.last - shard.first:
            found[shard.file] = hashlib.sha256(storage.read_bytes(shard.file)).hexdigest()
    return found


class Corpus:
    """Samples of a finished corpus by task and index. Shards are read when they are needed; the last ones used stay in memory."""

    def __init__(self, storage: Storage, told: Mapping[str, Any], cache: int = CACHE) -> None:
        self.storage, self.fingerprint, self._size = storage, str(told["fingerprint"]), int(told["size"])
        self._sizes = {str(task): int(count) for task, count in told["sizes"].items()}
        self.digests: dict[str, str] = dict(told["shards"])
        """SHA-256 of each shard's file."""
        self._cache, self._limit, self._held = OrderedDict[str, tuple[list[Sample], int]](), cache, 0

    @classmethod
    def open(cls, storage: Storage, cache: int = CACHE) -> Self:
        """The corpus in a storage.

        Raises:
            UserError: there is none, or it is damaged or of another version.
        """
        try:
            told = json.loads(storage.read_bytes(f"{FOLDER}/corpus.json"))
            if told["format"] != FORMAT:
                raise UserError(f"corpus: got format {told['format']}; this version reads format {FORMAT}")
            return cls(storage, told, cache)
        except FileNotFoundError as error:
            raise UserError(
                f"corpus: {storage.uri} has no {FOLDER}/corpus.json; it is written when all is tokenised"
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"corpus: {FOLDER}/corpus.json of {storage.uri} is damaged") from error

    @classmethod
    def commit(cls, storage: Storage, plan: Plan, digests: Mapping[str, str], size: int = SIZE) -> Self:
        """Write the description of shards that are all there, and open it."""
        missing = [shard.file for shard in plan.shards if shard.file not in digests]
        if missing:
            raise ValueError(f"a corpus needs all of its shards; {missing[0]} is missing")
        told = {
            "format": FORMAT, "fingerprint": plan.fingerprint, "size": size, "sizes": plan.sizes,
            "shards": {shard.file: digests[shard.file] for shard in plan.shards},
        }  # fmt: skip
        storage.write_bytes(f"{FOLDER}/corpus.json", json.dumps(told, indent=1).encode())
        return cls.open(storage)

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(task for task, count in self._sizes.items() if count)

    def size(self, task: str) -> int:
        """Samples of a task; 0 if there are none."""
        return self._sizes.get(task, 0)

    def get(self, task: str, index: int) -> Sample:
        """A sample.

        Raises:
            IndexError: there is no such sample.
            CheckpointError: its shard is damaged.
        """
        if not 0 <= index < self.size(task):
            raise IndexError(f"sample {index} of {self.size(task)} of {task}")
        number, place = divmod(index, self._size)
        return self._shard(Shard(task, number, 0, 0).file)[place]

    def _shard(self, file: str) -> list[Sample]:
        if file in self._cache:
            self._cache.move_to_end(file)
            return self._cache[file][0]
        samples, _ = read_shard(self.storage, file, self.digests[file])
        weight = sum(getattr(s, name).nbytes for sample in samples for s in sample.segments for name in STORED[type(s)])
        self._cache[file] = samples, weight
        self._held += weight
        while self._held > self._limit and len(self._cache) > WINDOW * len(self._sizes):
            self._held -= self._cache.popitem(last=False)[1][1]
        return samples


STORED: dict[type, dict[str, str]] = {
    Text: {"ids": "int32"}, Vision: {"latents": "float32"}, Look: {"cnn": "float16", "pixels": "float16"},
    Audio: {"codes": "int32"},
}  # fmt: skip
"""Arrays of each kind of segment and as what they are stored."""
READ = {"int32": np.int64, "float32": np.float32, "float16": np.float32}
KINDS = {kind.__name__: kind for kind in STORED}


def _fixed(segment: Segment) -> dict[str, Any]:
    """What a segment has besides arrays; the same for all samples of a shard."""
    rest = {name: getattr(segment, name) for name in segment.__dataclass_fields__ if name not in STORED[type(segment)]}
    return {"kind": type(segment).__name__, **rest}


def _segment(kind: Any, rest: dict[str, Any], column: dict[str, list[NDArray[Any]]], i: int) -> Segment:
    arrays = {name: column[name][i].astype(READ[dtype]) for name, dtype in STORED[kind].items()}
    made: Segment = kind(**arrays, **rest)
    return made
