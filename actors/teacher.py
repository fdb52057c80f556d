"""Teachers at work: actors that read prompts for the student's training workers.

Shapes: P pairs (query row, document row), m documents, d hidden size.

Notable choices
- A teacher loads its weights from the run's folder (safetensors), so that Ray can start it again anywhere: Ray restarts a dead
  one by itself and repeats its unanswered calls. What it answers is a function of the call, so no step is lost or changed.
- Documents are dealt to teachers, pair by pair the same way: each keeps the keys and values of its own documents and what it has
  answered, so a pair is read once in a run, and a document's prefix once.
- Answers travel as object references. The student asks for a step's pairs while it computes the step before (`ask`, `take`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import ray
import torch
from numpy.typing import NDArray

from raysys.runtime.checkpoint import read_state, write_state
from raysys.runtime.sentences import UserError
from raysys.runtime.session import Session
from raysys.runtime.storage import Storage
from raysys.systems.rabtriever.artifact import FOLDER, load_teacher
from raysys.systems.rabtriever.backbone import Part
from raysys.systems.rabtriever.targets import LocalTargets
from raysys.systems.rabtriever.teacher import Reranker

PROMPTS = f"{FOLDER}/prompts.safetensors"
"""The parts of all prompts of a run, for its teachers."""
RESTARTS = 10
"""Deaths of one teacher that are survived; one that dies whenever it starts ends the run."""
I64 = NDArray[np.int64]
F32 = NDArray[np.float32]


class Teacher:
    """One frozen reranker in a process of its own.

    Args:
        storage: the run's folder, which holds the teacher and the parts of the prompts.
        mine: rows of the documents that are dealt to this one.
    """

    def __init__(self, storage: Storage, mine: I64, threads: int) -> None:
        torch.set_num_threads(threads)
        device = "cuda" if ray.get_runtime_context().get_accelerator_ids().get("GPU") else "cpu"
        _, backbone, _ = load_teacher(storage, device)
        self.reranker = Reranker(backbone)
        told, _ = read_state(storage, PROMPTS)
        self.documents = Part(told["documents"], told["documents.length"])
        self.queries = Part(told["queries"], told["queries.length"])
        self.mine = mine
        self.targets: LocalTargets | None = None
        self.pairs = self.seconds = 0.0

    def states_of(self, what: str) -> F32:
        """e_D of this teacher's own documents, or e_Q of all queries alone."""
        if what == "queries":
            return self.reranker.queries(self.queries).numpy()
        return self.reranker.documents(self.documents.pick(torch.from_numpy(self.mine))).numpy()

    def answer(self, pairs: I64) -> F32:
        """The answer states (P, d) of pairs (P, 2)."""
        began = time.perf_counter()
        if self.targets is None:
            self.targets = LocalTargets(self.reranker, self.documents, self.queries, self.mine)
        states = self.targets.take(self.targets.ask(pairs)).numpy()
        self.pairs += len(pairs)
        self.seconds += time.perf_counter() - began
        return states

    def telemetry(self) -> dict[str, float]:
        """What it has done since it was started: pairs answered, pairs read, seconds at work, its process."""
        read = self.targets.read if self.targets is not None else 0
        return {"pairs": self.pairs, "read": float(read), "seconds": self.seconds, "pid": float(os.getpid())}


class Asked(NamedTuple):
    """Pairs under way: which rows of the answer each reference fills."""

    count: int
    parts: list[tuple[I64, Any]]


class Teachers:
    """All teachers of a run, as a source of targets; can be sent to the training workers."""

    def __init__(self, handles: list[Any], home: I64, width: int) -> None:
        self.handles, self.home, self.width = handles, home, width

    @classmethod
    def spawn(
        cls, session: Session, storage: Storage, documents: Part, queries: Part, width: int, *, count: int, cpus: float,
        gpus: float,
    ) -> Teachers:  # fmt: skip
        """Start teachers, each with every count-th document. They read the parts of the prompts from the run's folder, as they
        read their weights: a teacher that is started again needs nothing of this process.

        Raises:
            UserError: the cluster has not enough CPUs or GPUs for them.
        """
        have = ray.cluster_resources()
        if session.embedded and (count * cpus > have.get("CPU", 0) + 1e-9 or count * gpus > have.get("GPU", 0) + 1e-9):
            raise UserError(
                f"teachers: got {count} of {cpus:g} CPUs and {gpus:g} GPUs; this machine has {have.get('CPU', 0):g} CPUs and"
                f" {have.get('GPU', 0):g} GPUs"
            )
        count = min(count, len(documents.length))
        home = np.arange(len(documents.length)) % count
        options = {"num_cpus": cpus, "num_gpus": gpus, "max_restarts": RESTARTS, "max_task_retries": RESTARTS}
        actor = ray.remote(Teacher).options(scheduling_strategy="SPREAD", **options)
        parts = {"documents": documents.units, "documents.length": documents.length}
        write_state(storage, PROMPTS, parts | {"queries": queries.units, "queries.length": queries.length})
        threads = max(1, int(cpus))
        made = [actor.remote(storage, np.flatnonzero(home == i), threads) for i in range(count)]
        return cls(made, home, width)

    def document_states(self) -> torch.Tensor:
        """e_D (m, d) of all documents."""
        out = torch.empty(len(self.home), self.width)
        parts = ray.get([handle.states_of.remote("documents") for handle in self.handles])
        for i, part in enumerate(parts):
            out[torch.from_numpy(np.flatnonzero(self.home == i))] = torch.from_numpy(part.copy())
        return out

    def query_states(self) -> torch.Tensor:
        """e_Q (n, d) of all queries."""
        return torch.from_numpy(ray.get(self.handles[0].states_of.remote("queries")).copy())

    def ask(self, pairs: I64) -> Asked:
        """Send pairs (P, 2) to the teachers of their documents; nothing is waited for."""
        home = self.home[pairs[:, 1]]
        dealt = [(i, np.flatnonzero(home == i)) for i in range(len(self.handles))]
        return Asked(len(pairs), [(rows, self.handles[i].answer.remote(pairs[rows])) for i, rows in dealt if len(rows)])

    def take(self, asked: Asked) -> torch.Tensor:
        """Answer states (P, d), in the order asked."""
        out = torch.empty(asked.count, self.width)
        for rows, ref in asked.parts:
            out[torch.from_numpy(rows)] = torch.from_numpy(ray.get(ref).copy())
        return out

    def telemetry(self) -> list[Mapping[str, float]]:
        """What each teacher has done."""
        return ray.get([handle.telemetry.remote() for handle in self.handles])

    def stop(self) -> None:
        """End them: they are not restarted after this."""
        for handle in self.handles:
            ray.kill(handle, no_restart=True)
