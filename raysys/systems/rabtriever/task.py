"""A setting made concrete: data, the parts of the prompt, and what a trained teacher and student make of the test queries.

Shapes: n queries of a split, m documents, d hidden size.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from raysys.data.retrieval import GENERATED, Queries, Retrieval, load_retrieval
from raysys.runtime.seeds import Seeds, Stream
from raysys.systems.rabtriever.backbone import Part
from raysys.systems.rabtriever.examples import Examples, spread
from raysys.systems.rabtriever.learners import Frozen
from raysys.systems.rabtriever.predictor import Predictor, oracle
from raysys.systems.rabtriever.reader import Reader
from raysys.systems.rabtriever.setting import Setting
from raysys.systems.rabtriever.targets import Targets

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class Problem:
    """Data and its parts of prompts."""

    data: Retrieval
    examples: Examples
    documents: Part
    train: Part
    test: Part


def source_of(data: str, seed: int) -> str:
    """A generated task is drawn anew for each seed, rule and words included, unless its own seed is given."""
    name, _, options = data.rstrip(")").partition("(")
    if name.strip() not in GENERATED or re.search(r"\bseed\s*=", options):
        return data
    return f"{name.strip()}({options + ', ' if options.strip() else ''}seed={seed})"


def trained_on(source: str, asked: str) -> str:
    """What to ask a retriever that was trained on `source`: `asked`, or its own data where only their kind is asked for.

    Raises:
        ValueError: a generated task of another draw is asked for: its hidden rule is another one.
    """
    name, _, options = asked.rstrip(")").partition("(")
    own = source.partition("(")[0]
    if not asked or (name.strip() == own and own in GENERATED and not options.strip()):
        return source
    if name.strip() == own and own in GENERATED and asked.replace(" ", "") != source.replace(" ", ""):
        raise ValueError(
            f"data: got {asked!r}; this retriever was trained on {source!r}, and another draw has another rule"
        )
    return asked


def load_data(setting: Setting, seed: int) -> Retrieval:
    """The data of a setting, cut down to the numbers of queries asked for.

    Raises:
        DataError: it cannot be read.
    """
    data = load_retrieval(source_of(setting.data, seed))
    chosen = {
        "train": _chosen(len(data.train), setting.queries, Seeds(seed)),
        "test": _chosen(
            len(data.test), setting.test, Seeds(0)
        ),  # the same for all seeds, so that these can be paired by query
    }
    return replace(data, train=pick_queries(data.train, chosen["train"]), test=pick_queries(data.test, chosen["test"]))


def make_problem(setting: Setting, seed: int, reader: Reader) -> Problem:
    """Data, read once."""
    data = load_data(setting, seed)
    parts = reader.documents(data.documents), reader.queries(data.train.texts), reader.queries(data.test.texts)
    return Problem(data, Examples.of(data), *parts)


def _chosen(n: int, count: int, seeds: Seeds) -> NDArray[np.int64]:
    """Rows of a seeded choice of `count` of n, in order; all of them for 0."""
    if not count or count >= n:
        return np.arange(n)
    return np.sort(seeds.rng(Stream.PARTITION).permutation(n)[:count])


def pick_queries(queries: Queries, rows: NDArray[np.int64]) -> Queries:
    """Some of the queries."""
    ids, texts, relevant, grades = (
        tuple(values[i] for i in rows) for values in (queries.ids, queries.texts, queries.relevant, queries.grades)
    )
    return Queries(ids, texts, relevant, grades, queries.itself[rows])  # type: ignore[arg-type]


def student_scores(predictor: Predictor, frozen: Frozen, queries: torch.Tensor) -> F32:
    """Log-odds (n, m) of query states (n, d) with all documents, by the folded inner product."""
    predictor = copy.deepcopy(predictor).cpu().eval()
    with torch.inference_mode():
        u, c = predictor.fold(queries, frozen.direction)
        return (u @ frozen.documents.T + c[:, None]).numpy()


def energies(
    predictor: Predictor, frozen: Frozen, targets: Targets, problem: Problem, count: int = 64
) -> dict[str, float]:
    """How well states are met on known pairs: mean squared residual over the variance of the teacher's states.

    `oracle` is the smallest that any map of the predictor's form can reach (closed form, spec 2.6); the trained one lies above.
    """
    known = problem.examples.known
    known = known[spread(len(known), 4 * frozen.documents.shape[1])]
    z = predictor.document(frozen.documents)[torch.from_numpy(known)]
    rows = problem.examples.spread(count)
    pairs = np.stack([np.repeat(rows, len(known)), np.tile(known, len(rows))], 1)
    states = targets.take(targets.ask(pairs)).view(len(rows), len(known), -1)
    variance = float(states.flatten(0, 1).var(0, correction=0).mean())
    with torch.inference_mode():
        a, b = predictor(frozen.queries[torch.from_numpy(rows)])
        trained = float(((a[:, None] * z + b[:, None] - states) ** 2).mean())
        best = float(np.mean([float(oracle(z, one, predictor.shift is not None)[2]) for one in states]))
    return {"energy": trained / variance, "oracle": best / variance}
