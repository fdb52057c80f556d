"""Decoding by the unified model: with its cache beside reading everything again, and sub-models beside the whole model.

    python benchmarks/ernie_decode.py [--json PATH] [--quick]

Cache: 256 tokens of text after a prompt of 16, the most likely ones, written with the cache, and by reading prompt and answer
anew for every token with the same model (only the last token's logits are computed); the tokens must be equal.
Sub-models: times of the whole model and of sub-models, as views on its weights and cut out as models of their own, for decoding
(a token at a context of about 128, one row and eight) and for reading (8 rows of 256 tokens, all logits), beside the ratio of
operations by `cut.cost`. The goal is a speed-up within 20% of that ratio.

One thread. Times are CPU times, medians over rounds in which all variants take turns, so that a busy machine is the same to all.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import results
import torch

from raysys.systems.ernie.batch import pack
from raysys.systems.ernie.cut import cost, cut
from raysys.systems.ernie.elastic import SubModel, by_usage
from raysys.systems.ernie.flow import Flow, no_vision
from raysys.systems.ernie.model import UniModel
from raysys.systems.ernie.setting import ModelSetting, Sizes
from raysys.systems.ernie.stream import NONE, Sample, Special, Text, lay

TOKENS, PROMPT, CONTEXT, GOAL, WITHIN = 256, 16, 128, 5.0, 0.2
SIZES = Sizes(512, 16, ((1, 1), (2, 2), (4, 4)), 64, 4, 32, 1)
MODELS = {
    "the default setting": {},
    "256 wide, 12 layers, 64 experts": {"width": 256, "layers": 12, "heads": 8, "expert_width": 128, "shared_width": 256},
    "512 wide, 12 layers, 16 experts": {
        "width": 512, "layers": 12, "heads": 8, "experts": 16, "expert_width": 512, "shared_width": 512,
    },
}  # fmt: skip


def make(values: Mapping[str, Any]) -> UniModel:
    """A model with random weights, whose texts do not end: weights do not change what a token costs."""
    torch.manual_seed(0)
    model = UniModel(ModelSetting.of(values), SIZES).eval().requires_grad_(False)
    model.text.weight.data[Special.EOS] = 0
    return model


def said(n: int, seed: int = 0) -> Text:
    return Text(np.random.default_rng(seed).integers(len(Special), SIZES.vocabulary, n), False)


# ---------------------------------------------------------------- with and without the cache


def again(model: UniModel, given: list[int]) -> tuple[int, float]:
    """The token after the prompt and `given`, by reading all of it; and the CPU seconds."""
    began = time.process_time()
    laid = lay(Sample("lm", (said(PROMPT),)), SIZES.scales, Special.SEP)
    for id in given:
        laid.word(id)
    batch = pack([laid], None, no_vision, SIZES.bits, SIZES.levels, SIZES.codes)
    asked = torch.full_like(batch.next, NONE)
    asked[0, -1] = 0
    return int(model(replace(batch, next=asked)).text.argmax()), time.process_time() - began


def cache_rows(name: str, model: UniModel, quick: bool) -> list[dict[str, Any]]:
    """Rows for all tokens, and for the last ones. Every few tokens one is also found by reading again: both see the same load."""
    every = 16 if quick else 4
    again(model, [20] * 8)
    flow = Flow(model, [Sample("lm", (said(PROMPT),))], Special.SEP, TOKENS)
    asked = torch.full_like(flow.prompt.next, NONE)
    asked.view(-1)[flow.last] = 0
    ids, ours, theirs = list[int](), list[float](), dict[int, float]()
    for i in range(TOKENS):
        began = time.process_time()
        out = flow.start(next=asked) if i == 0 else flow.text(torch.tensor(ids[-1:]))
        id = int(out.text.argmax())
        ours.append(time.process_time() - began)
        if i % every == every - 1:
            found, theirs[i] = again(model, ids)
            if found != id:
                raise AssertionError("the cache changes what is written")
        ids.append(id)
    rows = []
    for case, first in ((f"{name}: {TOKENS} tokens", 0), (f"{name}: the last 32 of {TOKENS}", TOKENS - 32)):
        mine, other = float(np.mean(ours[first:])), float(np.mean([t for i, t in theirs.items() if i >= first]))
        rows.append(
            {
                "case": case,
                "ours": 1e3 * mine,
                "peer": 1e3 * other,
                "unit": "ms/token",
                "ratio": other / mine,
                "rel_diff": 0.0,
            }
        )
    return rows


# ---------------------------------------------------------------- sub-models


def sub_models(setting: ModelSetting) -> dict[str, SubModel]:
    """Fewer layers, fewer active experts, both, and half of the experts too."""
    every, top = setting.layers, tuple(range(setting.layers - SIZES.levels, setting.layers))
    middle = tuple(range(1, setting.layers - SIZES.levels))
    half = (0, *middle[::2][: len(middle) // 2], *top)
    counts = torch.rand(every, setting.experts, generator=torch.Generator().manual_seed(0))
    return {
        "half of the middle layers": SubModel(half, setting.active),
        "k = 2 of 4": SubModel(tuple(range(every)), 2),
        "k = 1 of 4": SubModel(tuple(range(every)), 1),
        "no middle layers, k = 1": SubModel((0, *top), 1),
        "half of the layers, k = 2, half of the experts": SubModel(half, 2, by_usage(counts, 0.5, half)),
    }


def decoding(model: UniModel, sub: SubModel | None, rows: int) -> Callable[[], Any]:
    """A step of `rows` rows at a context of about CONTEXT tokens."""
    prompts = [Sample("lm", (said(CONTEXT - 10, row),)) for row in range(rows)]
    flow = Flow(model, prompts, Special.SEP, 400, sub)
    flow.start()
    token = torch.arange(20, 20 + rows)
    start = flow.cache.length

    def step() -> None:
        flow.cache.length = start + (flow.cache.length - start) % 16
        flow.text(token)

    return step


def reading(model: UniModel, sub: SubModel | None) -> Callable[[], Any]:
    """8 rows of 256 tokens with all their logits (teacher forcing)."""
    laid = [lay(Sample("lm", (Text(said(256, row).ids, True, False),)), SIZES.scales) for row in range(8)]
    batch = pack(laid, None, no_vision, SIZES.bits, SIZES.levels, SIZES.codes)
    elastic = None if sub is None else sub.rows(8, model.setting)
    return lambda: model(batch, elastic)


def turns(works: Mapping[str, Callable[[], Any]], rounds: int, each: int) -> dict[str, float]:
    """Median CPU ms of each, all in turns."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            began = time.process_time()
            for _ in range(each):
                work()
            if number:
                taken[name].append(1e3 * (time.process_time() - began) / each)
    return {name: float(np.median(values)) for name, values in taken.items()}


def sub_rows(name: str, model: UniModel, quick: bool) -> list[dict[str, Any]]:
    """Speed-ups of views and of models cut out; `peer` is the whole model, `predicted` the ratio of operations."""
    subs, full = sub_models(model.setting), SubModel.full(model.setting)
    copies = {case: cut(model, sub).requires_grad_(False) for case, sub in subs.items()}
    rows = []
    for way, rounds, each, work in (
        ("decoding", 5 if quick else 15, 8, lambda m, s: decoding(m, s, 1)),
        ("decoding 8 rows", 5 if quick else 15, 4, lambda m, s: decoding(m, s, 8)),
        ("reading", 2 if quick else 5, 1, reading),
    ):
        works = {"whole": work(model, None)}
        works |= {f"view: {case}": work(model, sub) for case, sub in subs.items()}
        works |= {f"cut: {case}": work(copy, None) for case, copy in copies.items()}
        found = turns(works, rounds, each)
        for case, sub in subs.items():
            predicted = cost(model, full, CONTEXT).flops / cost(model, sub, CONTEXT).flops
            for form in ("view", "cut"):
                ours, whole = found[f"{form}: {case}"], found["whole"]
                rows.append({
                    "case": f"{name}, {way}: {form}, {case}", "ours": ours, "peer": whole, "unit": "ms", "ratio": whole / ours,
                    "predicted": predicted, "within": bool(abs(whole / ours / predicted - 1) <= WITHIN), "rel_diff": 0.0,
                })  # fmt: skip
    return rows


@torch.no_grad()
def main() -> None:
    """All of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="few repetitions")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    began, caches, subs = time.monotonic(), list[dict[str, Any]](), list[dict[str, Any]]()
    for name, values in MODELS.items():
        model = make(values)
        for one in cache_rows(name, model, arguments.quick):
            caches.append(one)
            print(f"{one['case']:62} {one['ours']:8.2f} {one['peer']:8.2f} ms/token  x {one['ratio']:.1f}", flush=True)
        for one in sub_rows(name, model, arguments.quick):
            subs.append(one)
            print(
                f"{one['case']:112} {one['ours']:8.2f} ms  x {one['ratio']:.2f}, operations x {one['predicted']:.2f}"
                f"  {'within' if one['within'] else 'outside'} {WITHIN:.0%}",
                flush=True,
            )
    told = results.result(
        "the same model without cache", "this tree", caches, began, goal=GOAL, sub_models=subs, within=WITHIN
    )
    results.write(arguments.json, told)


if __name__ == "__main__":
    main()
