"""Local training of ten clients' adapters, all in one batch, against one peft model per client in a loop.

    python benchmarks/grouped_vs_peft.py [--json PATH] [--data PATH ...] [--quick]

MiniLM, rank 8 on query and value of the top two of its six layers, ten clients, AdamW, batches of 4 and of 16 texts, one thread;
the grammar task, and with --data any other (such as ../shared/data/clinc150). Client-steps per second of processor time.

The peer is what the loops of Dec-LoRA, FlowerTune and the GLUE scripts do: a Hugging Face model with a peft adapter, one client
after the other, torch's AdamW on the adapter's parameters, every layer run on every text. Texts are tokenised once, beforehand;
there is no dropout, so that results can be compared. Three ways to pad:
- `pad 128`: to the paper's length of 128, as public scripts do (padding="max_length"); the tokens are the same;
- `pad 32`: to the length of 32 that our setting cuts texts at;
- `pad batch`: to the longest text of a client's batch.

`parts` says what the ratio consists of, each line with one thing more than the line before: `backend peft` is our own loop with
peft (what tests hold the grouped path against), `kept states` one client at a time from the states below the adapted layers,
`grouped` all ten in one batch, `bfloat16` the frozen products in that arithmetic, which pays only where the processor has units
for it (AVX-512 BF16, AMX; elsewhere torch's fallback is many times slower). Keeping the states costs one pass through the lower
layers per text, once per process: `keep_ms_per_text`, not part of the rates.

The same batches on all sides. `rel_diff`: how far a side's factors are from those of `grouped` after three steps of SGD, relative
to how far these moved. Sides take turns; the median of the repetitions counts; `pad 128` and `bfloat16` (batches of 4) run once.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import results
import torch
from aggregation_vs_byzfl import ROOT

CLIENTS, GOAL, SGD_STEPS = 10, 8.0, 3
EXAMPLES = 300
STEPS = {"pad 128": 1, "pad 32": 2, "pad batch": 3, "backend peft": 3, "kept states": 4, "grouped": 6, "bfloat16": 1}
"""Sides, in the order of `parts` -> local steps that are timed."""
PEER = ("pad 128", "pad 32", "pad batch")
SLOW = ("pad 128", "bfloat16")
"""Timed once, whatever the repetitions: seconds long, and nothing hangs on their last digit."""
Factors = tuple[torch.Tensor, torch.Tensor]
Side = Callable[[], Factors]


def task(data: str, batch: int, steps: int, **more: Any) -> Any:
    """The clients, their texts and batches."""
    from raysys.systems.tad_lora.setting import Setting
    from raysys.systems.tad_lora.task import Task

    told = {"data": data, "examples": EXAMPLES, "method": "lora", "topology": "complete", "peers": CLIENTS}
    return Task(Setting.of({**told, "partition": "iid", "batch": batch, "steps": steps, "lr": 1e-3, **more}), 0)


class PublicLoop:
    """One client after the other through one peft model, as public codes do it."""

    def __init__(self, one: Any, padding: str) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModel

        from raysys.nn.lora import peft_factors
        from raysys.nn.pretrained import find_model

        s, self.learner = one.setting, one.learner
        model = AutoModel.from_pretrained(find_model(s.model))
        top = list(range(model.config.num_hidden_layers))[-s.layers :]
        told = {"r": s.rank, "lora_alpha": s.alpha, "lora_dropout": 0.0, "layers_to_transform": top}
        self.model = get_peft_model(model, LoraConfig(target_modules=["query", "value"], **told)).eval()
        self.factors = peft_factors(self.model, self.learner.layout)
        texts, tokenizer = one.texts[0], self.learner.body.base.tokenizer
        second = None if texts.second is None else list(texts.second)
        made = tokenizer(list(texts.first), second, truncation=True, max_length=s.max_length, padding=True)
        kept = {key: torch.tensor(value) for key, value in made.items()}
        width = {"pad 128": 128, "pad 32": 32, "pad batch": kept["attention_mask"].shape[1]}[padding]
        fill = {"input_ids": tokenizer.pad_token_id}
        self.made = {
            key: torch.nn.functional.pad(value, (0, width - value.shape[1]), value=fill.get(key, 0))
            for key, value in kept.items()
        }
        self.cut = padding == "pad batch"

    def loss(self, rows: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of some texts."""
        made = {key: value[rows] for key, value in self.made.items()}
        if self.cut:
            longest = int(made["attention_mask"].sum(1).max())
            made = {key: value[:, :longest] for key, value in made.items()}
        mask = made["attention_mask"][..., None].float()
        pooled = (self.model(**made).last_hidden_state * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.cross_entropy(pooled @ self.learner.head.T, self.learner.y[rows])

    def train(self, a: torch.Tensor, b: torch.Tensor) -> Factors:
        from raysys.nn.lora import load_factors

        s, layout = self.learner.setting, self.learner.layout
        parameters = [p.requires_grad_(True) for group in self.factors for p in group]
        after = a.clone(), b.clone()
        for client in range(CLIENTS):
            load_factors(self.model, layout, a[client], b[client])
            if s.optimizer == "sgd":
                optimizer: torch.optim.Optimizer = torch.optim.SGD(parameters, lr=s.lr)
            else:
                optimizer = torch.optim.AdamW(parameters, lr=s.lr, weight_decay=0.0)
            for step in range(s.steps):
                rows = torch.from_numpy(self.learner.batch(np.array([client]), 0, step)[0])
                loss = self.loss(rows)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            for flat, group in zip(after, self.factors, strict=True):
                flat[client] = layout.join([p.detach() for p in group])
        return after


def side(name: str, data: str, batch: int, **more: Any) -> Side:
    """One way to do a round's local steps of all clients: call it and get the factors after them."""
    kind = {"backend peft": {"backend": "peft"}, "bfloat16": {"precision": "bfloat16"}}.get(name, {})
    one = task(data, batch, **({"steps": STEPS[name]} | kind | more))
    everyone = np.arange(CLIENTS)
    a, b = (x.repeat(CLIENTS, 1) for x in one.start(-1))
    if name in PEER:
        loop = PublicLoop(one, name)
        return lambda: loop.train(a, b)

    if name != "backend peft":
        one.learner.store.of(np.concatenate(one.division))  # before the clock runs

    def in_groups(size: int) -> Factors:
        cut = [everyone[at : at + size] for at in range(0, CLIENTS, size)]
        done = [one.learner.train(group, a[group], b[group], 0, "AB", {}, None) for group in cut]
        return torch.cat([x for x, _ in done]), torch.cat([y for _, y in done])

    return lambda: in_groups(1 if name == "kept states" else CLIENTS)


def differences(data: str, names: list[str]) -> dict[str, float]:
    """After SGD from the same start on the same batches: how far each side's factors are from those of `grouped`."""
    start = torch.cat([x.repeat(CLIENTS, 1) for x in task(data, 4, 1).start(-1)], 1)
    after = {}
    for name in names:
        after[name] = torch.cat(side(name, data, 4, steps=SGD_STEPS, optimizer="sgd", lr=0.5)(), 1)
    moved = float((after["grouped"] - start).norm())
    return {name: float((x - after["grouped"]).norm()) / moved for name, x in after.items()}


def timed(sides: dict[str, Side], steps: dict[str, int], repetitions: int) -> dict[str, float]:
    """Client-steps per second of processor time; the sides take turns."""
    spent: dict[str, list[float]] = {name: [] for name in sides}
    for repetition in range(repetitions + 1):
        for name, run in sides.items():
            if name in SLOW and repetition != 1:
                continue
            began = time.process_time()
            run()
            if repetition:  # the first time warms up
                spent[name].append(time.process_time() - began)
    return {name: CLIENTS * steps[name] / float(np.median(seconds)) for name, seconds in spent.items()}


def keeping(data: str) -> float:
    """Milliseconds of processor time to compute and keep a text's states below the adapted layers."""
    from raysys.nn.textstore import TextStore

    one = task(data, 4, 1)
    texts = one.texts[0]
    count = len(texts.y)
    began = time.process_time()
    TextStore(one.learner.body, texts.first, texts.second).of(np.arange(count))
    return 1e3 * (time.process_time() - began) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--data", nargs="*", default=[], help="more data to measure with, as jobs.tad_lora takes it")
    parser.add_argument("--quick", action="store_true", help="batches of 4, without 128 and bfloat16, one repetition")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    import peft

    torch.set_num_threads(1)
    began = time.monotonic()
    names = [name for name in STEPS if not (arguments.quick and name in ("pad 128", "bfloat16"))]
    batches, repetitions = ((4,), 1) if arguments.quick else ((4, 16), 3)
    rows, parts, keep = [], [], {}
    for data in ("grammar", *arguments.data):
        label = data if data == "grammar" else Path(data).name
        differs = differences(data, names)
        keep[label] = keeping(data)
        for batch in batches:
            measured = [name for name in names if name != "bfloat16" or batch == batches[0]]
            rate = timed({name: side(name, data, batch) for name in measured}, STEPS, repetitions)
            before = None
            for name in measured:
                gain = None if before is None else rate[name] / rate[before]
                parts.append(
                    {"data": label, "batch": batch, "what": name, "rate": rate[name], "gain": gain, "rel_diff": differs[name]}
                )  # fmt: skip
                before = name
                print(
                    f"{label:10s} batch {batch:2d}  {name:13s} {rate[name]:7.1f} client-steps/CPU-s"
                    f"  {'' if gain is None else f'x{gain:5.2f}':6s}  differs by {differs[name]:.1e}",
                    flush=True,
                )
            rows += [
                {
                    "case": f"{label}, batch {batch}, against peft, {name}", "ours": rate["grouped"], "peer": rate[name],
                    "unit": "client-steps/CPU-s", "ratio": rate["grouped"] / rate[name], "rel_diff": differs[name],
                }
                for name in PEER if name in names
            ]  # fmt: skip
    goals = [
        {
            "goal": f"{GOAL:g} times the client-steps: {row['case']}", "measured": row["ratio"], "limit": GOAL,
            "met": row["ratio"] >= GOAL,
        }
        for row in rows
    ]  # fmt: skip
    result = results.result(
        "peft", peft.__version__, rows, began, clients=CLIENTS, parts=parts, goals=goals, keep_ms_per_text=keep
    )
    for goal in goals:
        print(f"{'met' if goal['met'] else 'MISSED'}: {goal['goal']}: {goal['measured']:.2f}")
    for label, ms in keep.items():
        print(f"{label}: {ms:.1f} ms once per text to keep its lower states")
    print(f"{result['wall_s']:.0f} s")
    results.write(arguments.json, result)


if __name__ == "__main__":
    main()
