"""A query against a pool of documents: the student's search beside its own teacher reading the pool, and the quality it costs.

    python benchmarks/rabtriever_latency.py [--json PATH] [--quick]

Quality: a teacher and a student on the embedded rationale task (192 documents, 400 queries), nDCG@10 of both.
Time: from a query's text to its first ten documents out of 1,000 texts of that kind, one thread, median CPU time. The teacher is
timed three ways: as a reranker that reads texts (what a cross-encoder does), with the documents' vectors at hand, and with their
keys and values kept. The embedded teacher is tiny and its frozen encoder reads the query on both sides, so the last two ratios
are small; `language model` rows are of a Qwen2-class model (d = 128, 4 layers) over token ids, the kind that the paper uses, at
32 tokens of document and query each.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import results
import torch

from jobs.rabtriever_compare import run_seed
from raysys.data.retrieval import load_retrieval
from raysys.systems.rabtriever.artifact import Description, Retriever, fingerprint
from raysys.systems.rabtriever.cost import Shape, measure
from raysys.systems.rabtriever.predictor import Predictor
from raysys.systems.rabtriever.reader import make_backbone, make_reader
from raysys.systems.rabtriever.setting import Setting

GOAL, POOL, TOP = 50.0, 1000, 10


def retriever(setting: Setting) -> Retriever:
    """An untrained retriever of the embedded kind: weights do not change what it costs."""
    reader = make_reader(setting.teacher)
    backbone = make_backbone(setting.teacher, reader, 0)
    told = Description(
        format=1, teacher=setting.teacher, student=setting.student, fingerprint=fingerprint(setting.teacher, backbone, reader),
        data="", licence="", width=backbone.width, predictor="",
    )  # fmt: skip
    return Retriever(told, backbone, reader, Predictor(backbone.width, hidden=setting.student.hidden), "untrained")


def median_ms(work: Callable[[], Any], repeats: int) -> float:
    """Median CPU time in ms, after one call that is not counted."""
    work()
    taken = []
    for _ in range(repeats):
        began = time.process_time()
        work()
        taken.append(time.process_time() - began)
    return 1e3 * float(np.median(taken))


def row(case: str, ours: float, peer: float) -> dict[str, Any]:
    """A row of the results: both in ms per query. The two rank differently, which `quality` measures."""
    return {"case": case, "ours": ours, "peer": peer, "unit": "ms/query", "ratio": peer / ours, "rel_diff": 0.0}


def timed(repeats: int) -> list[dict[str, Any]]:
    """Rows of the embedded teacher, then of the language model."""
    setting = Setting()
    made, data = retriever(setting), load_retrieval("rationale(documents=1152)")
    texts, query = list(data.documents[:POOL]), data.test.texts[0]
    z = made.documents(texts)
    part = made.reader.documents(texts)
    prefix = made.teacher.keep(part)
    pairs = np.stack([np.zeros(POOL, np.int64), np.arange(POOL)], 1)

    def student() -> np.ndarray:
        u, _ = made.queries([query])
        scores = (u @ z.T)[0]
        best = np.argpartition(-scores, TOP)[:TOP]
        return best[np.argsort(-scores[best])]

    def reread(kept: Any) -> np.ndarray:
        states = made.teacher.states(part, made.reader.queries([query]), pairs, kept)
        return np.argsort(-made.teacher.scores(states).numpy())[:TOP]

    ours = median_ms(student, repeats)
    peers = {
        "embedded, teacher reads texts": median_ms(
            lambda: np.argsort(-made.rerank(query, texts))[:TOP], max(3, repeats // 5)
        ),
        "embedded, documents' vectors at hand": median_ms(lambda: reread(None), repeats),
        "embedded, keys and values kept": median_ms(lambda: reread(prefix), repeats),
    }
    rows = [row(case, ours, peer) for case, peer in peers.items()]
    shape = Shape()
    found = {one["way"]: one["ms"] for one in measure(shape, [32], POOL, 16, max(3, repeats // 3))}
    for way in ("teacher", "teacher, prefixes kept"):
        rows.append(row(f"language model, {way}", found["student"], found[way]))
    return rows


def quality(quick: bool) -> dict[str, float]:
    """nDCG@10 of teacher and student on the embedded rationale task, in points."""
    values = {"teacher": {"steps": 20}, "student": {"steps": 20}} if quick else {}
    found = run_seed(Setting.of(values), 0, ["student", "teacher"], 0)["values"]
    return {name: 100 * float(np.mean(found[name]["ndcg@10"])) for name in ("student", "teacher")}


def main() -> None:
    """Both measurements."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="few repetitions, hardly any training")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    rows = timed(5 if arguments.quick else 25)
    for one in rows:
        print(f"{one['case']:40} {one['ours']:9.2f} {one['peer']:10.2f} ms/query  x {one['ratio']:.1f}", flush=True)
    reached = quality(arguments.quick)
    print(
        f"nDCG@10: student {reached['student']:.1f}, teacher {reached['teacher']:.1f} (goal: drop under 3); ratio goal {GOAL:g}"
    )
    results.write(arguments.json, results.result("its own teacher", "this tree", rows, began, goal=GOAL, ndcg=reached))


if __name__ == "__main__":
    main()
