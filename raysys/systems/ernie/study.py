"""The elastic study: one run's sub-models beside models trained alone, a plain model pruned afterwards, and separated experts.

Shapes: L layers, E experts, k active ones, Q code levels.

Notable choices
- Equal steps, batches and seed for all. An elastic step computes less where rows are reduced (52 % of them are), so at equal
  steps elastic training is cheaper than plain training.
- Experts of a narrow sub-model are those that training data used most, each layer by itself.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from raysys.runtime.statistics import Interval, mean_ci, paired_difference
from raysys.systems.ernie.artifact import Bundle
from raysys.systems.ernie.batch import Batch
from raysys.systems.ernie.corpus import Corpus
from raysys.systems.ernie.cut import cost, cut
from raysys.systems.ernie.elastic import SubModel, by_usage
from raysys.systems.ernie.evaluate import batches, held_out_losses
from raysys.systems.ernie.model import UniModel
from raysys.systems.ernie.routing import choices, loads, report, usage
from raysys.systems.ernie.setting import ElasticSetting, ModelSetting, PretrainSetting
from raysys.systems.ernie.stream import TASKS, Sample

OFF = ElasticSetting(depth=0.0, width=0.0, sparsity=0.0)
SOLVED = 0.05
"""Nats, below which a task is learned."""
STEPS = 6
"""Steps whose samples tell which experts are used most, and how evenly."""
CONTEXT = 64
"""Tokens that a token attends to, for FLOPs: about half of a sample."""


@dataclass(frozen=True)
class Rung:
    """A step of the ladder: its label, layers passed over, part of the experts, active experts (None for all)."""

    label: str
    dropped: int = 0
    share: float = 1.0
    active: int | None = None

    def of(self, setting: ModelSetting, levels: int, counts: torch.Tensor) -> SubModel:
        """The sub-model: the last of the middle layers go, the most used experts (counts (L, E)) stay."""
        middle = list(range(1, setting.layers - levels))
        gone = set(middle[len(middle) - self.dropped :])
        layers = tuple(i for i in range(setting.layers) if i not in gone)
        experts = by_usage(counts, self.share, layers) if self.share < 1 else None
        return SubModel(layers, self.active or setting.active, experts)

    def alone(self, setting: ModelSetting) -> ModelSetting:
        """The sizes of a model of its own."""
        return setting.with_values(
            {
                "layers": setting.layers - self.dropped,
                "experts": max(1, round(self.share * setting.experts)),
                "active": self.active or setting.active,
            }
        )


def ladder(setting: ModelSetting, levels: int) -> list[Rung]:
    """What is compared: each dimension reduced by itself, and all together."""
    middle = setting.layers - 1 - levels
    found = [Rung("whole")]
    if setting.active > 1:
        found += [Rung(f"k = {k}", active=k) for k in dict.fromkeys((max(1, setting.active // 2), 1))]
    if setting.experts >= 2 * setting.active:
        found.append(Rung("half the experts", share=0.5))
    if middle > 0:
        found.append(Rung(f"{middle} of {setting.layers} layers out", dropped=middle))
    if len(found) == 5:
        found.append(Rung("all three", middle, 0.5, max(1, setting.active // 2)))
    return found


def variant(
    name: str, model: ModelSetting, pretrain: PretrainSetting, levels: int
) -> tuple[ModelSetting, PretrainSetting]:
    """Sizes and training of a variant: elastic, plain, separated, dense, unbalanced, auxiliary, or `alone LABEL`."""
    plain = pretrain.with_values({"elastic": OFF.model_dump()})
    if name == "elastic":
        return model, pretrain
    if name.startswith("alone "):
        rung = next(r for r in ladder(model, levels) if r.label == name.removeprefix("alone "))
        return rung.alone(model), plain
    changes: Mapping[str, dict[str, Any]] = {
        "plain": {},
        "separated": {"routing": "separated"},
        "dense": {"experts": 1, "active": 1, "expert_width": model.active * model.expert_width, "balance": "none"},
        "unbalanced": {"balance": "none"},
        "auxiliary": {"balance": "aux"},
    }
    return model.with_values(changes[name]), plain


def examine(
    bundle: Bundle, trained_on: Sequence[Sample], held_out: Sequence[Sample], rungs: Sequence[Rung], timed: bool
) -> dict[str, Any]:
    """Held-out losses and costs of a trained model at each rung (with seconds if `timed`), and its routing.

    Args:
        trained_on: training samples, as often of each task as in training: they tell the most used experts and the balance.
    """
    model, s = bundle.model.eval(), bundle.model.setting
    counts = loads(model, batches(bundle, trained_on))
    read = batches(bundle, held_out)
    told: dict[str, Any] = {"rungs": {}}
    subs = {rung.label: rung.of(s, model.levels, counts) for rung in rungs}
    spent = seconds(model, subs, read) if timed else {}
    for label, sub in subs.items():
        c = cost(model, sub, CONTEXT)
        told["rungs"][label] = {
            "losses": held_out_losses(bundle, held_out, sub), "total": c.total, "active": c.active, "flops": c.flops,
            **spent.get(label, {}),
        }  # fmt: skip
    found = usage(choices(model, read), s.experts)
    told["routing"] = report(found, counts)
    told["usage"] = {name: c.tolist() for name, c in found.items()}
    return told


@torch.no_grad()
def seconds(
    model: UniModel, subs: Mapping[str, SubModel], read: Sequence[Batch], rounds: int = 3
) -> dict[str, dict[str, float]]:
    """Processor seconds for reading batches by each sub-model, as a view and cut out: the least of rounds of taking turns."""
    own, spent = [cut(model, sub) for sub in subs.values()], np.full((len(subs), 2), np.inf)
    for _ in range(rounds):
        for i, sub in enumerate(subs.values()):
            began = time.process_time()
            for batch in read:
                model(batch, sub.rows(batch.rows, model.setting))
            between = time.process_time()
            for batch in read:
                own[i](batch)
            spent[i] = np.minimum(spent[i], (between - began, time.process_time() - between))
    return {name: {"view_s": float(s[0]), "cut_s": float(s[1])} for name, s in zip(subs, spent, strict=True)}


def as_trained(corpus: Corpus, counts: Mapping[str, int]) -> list[Sample]:
    """The first training samples, as many of each task as STEPS steps have."""
    return [corpus.get(task, i) for task, n in counts.items() for i in range(min(STEPS * n, corpus.size(task)))]


Results = Sequence[Mapping[str, Any]]
"""By seed: variant -> what `examine` told."""


def ratio(results: Results, ours: tuple[str, str], theirs: tuple[str, str]) -> Interval:
    """Mean over tasks of log loss(ours) - log loss(theirs), by seed, as an interval over seeds. Each is (variant, rung).

    A loss below SOLVED counts as that: ratios of nothing would drown all others."""
    differences = []
    for one in results:
        a, b = (one[variant]["rungs"][rung]["losses"] for variant, rung in (ours, theirs))
        differences.append(float(np.mean([np.log(max(a[t], SOLVED) / max(b[t], SOLVED)) for t in TASKS if t in a])))
    return mean_ci(differences)


def loss(results: Results, variant: str, rung: str, task: str) -> Interval:
    """A task's held-out loss over seeds."""
    return mean_ci([one[variant]["rungs"][rung]["losses"][task] for one in results])


def gap(results: Results, ours: tuple[str, str], theirs: tuple[str, str], task: str) -> Interval:
    """Paired difference of a task's loss, ours - theirs."""
    a, b = ([one[v]["rungs"][r]["losses"][task] for one in results] for v, r in (ours, theirs))
    return paired_difference(a, b)


def claims(results: Results, rungs: Sequence[str]) -> list[dict[str, Any]]:
    """The paper's claims about elastic training and routing, as far as the variants they need were run."""
    ran, found = set(results[0]), list[dict[str, Any]]()
    reduced = [r for r in rungs if r != "whole"]

    def claim(text: str, source: str, difference: Interval, holds: bool) -> None:
        found.append({"claim": text, "source": source, "holds": holds, "interval": difference})

    if {"elastic", "plain"} <= ran:
        d = ratio(results, ("elastic", "whole"), ("plain", "whole"))
        claim(
            "the whole elastic model is within 2 % of plain training (mean log loss over tasks)",
            "Tables 9-11",
            d,
            d.below(np.log(1.02)),
        )
        for rung in reduced:
            d = ratio(results, ("elastic", rung), ("plain", rung))
            claim(f"{rung}: the elastic run's view beats the plain model pruned", "Tables 9-11", d, d.below(0))
            d = ratio(results, ("elastic", rung), ("elastic", "whole"))
            claim(f"{rung}: within 10 % of the whole elastic model", "Tables 9-11", d, d.below(np.log(1.10)))
    for rung in reduced:
        if {"elastic", f"alone {rung}"} <= ran:
            d = ratio(results, ("elastic", rung), (f"alone {rung}", "whole"))
            claim(
                f"{rung}: the view is within 5 % of a model trained alone at equal steps",
                "Section 3.3",
                d,
                d.below(np.log(1.05)),
            )
    if {"plain", "separated"} <= ran:
        d = ratio(results, ("plain", "whole"), ("separated", "whole"))
        claim("modality-agnostic routing beats separated experts at equal size", "Section 2.1", d, d.below(0))
    if {"plain", "dense"} <= ran:
        d = ratio(results, ("plain", "whole"), ("dense", "whole"))
        claim("the mixture beats a dense model of equal active size", "control", d, d.below(0))
    for other in ("unbalanced", "auxiliary"):
        if {"plain", other} <= ran:
            d = ratio(results, ("plain", "whole"), (other, "whole"))
            claim(
                f"balance by bias: no worse than {other} (mean log loss)",
                "Section 2.1, from Wang et al. 2024",
                d,
                d.below(np.log(1.01)),
            )
    return found
