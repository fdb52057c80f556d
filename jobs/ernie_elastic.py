"""Sub-models of one elastic run against models trained alone, pruning, and other ways of routing; paired seeds, Ray tasks."""

from __future__ import annotations

from typing import Any

import numpy as np
import ray
from pydantic import Field, model_validator

from jobs.ernie_config import ErnieConfig, read
from jobs.ernie_show import routing_figures
from jobs.ernie_stages import get_corpus, get_tokenizers, held_out, train_beside
from raysys.runtime.pool import run_stages
from raysys.runtime.run import Run
from raysys.runtime.session import Session
from raysys.runtime.statistics import Interval
from raysys.runtime.storage import Storage
from raysys.runtime.train import TrainConfig as Spread
from raysys.systems.ernie import figures, study
from raysys.systems.ernie.corpus import Corpus
from raysys.systems.ernie.setting import ModelSetting, PretrainSetting
from raysys.systems.ernie.stream import Sample

OTHERS = ("separated", "dense", "unbalanced", "auxiliary")


class ElasticConfig(ErnieConfig):
    """Sub-models of one elastic run against models trained alone and pruning; ways of routing; routing maps."""

    seeds: int = Field(3, ge=1, le=10_000)
    """Paired repetitions of every variant."""
    others: list[str] = Field(["separated"])
    """Further variants at equal steps: separated experts, a dense model, no balance (unbalanced), auxiliary losses."""
    alone: bool = True
    """Also train a model of each sub-model's size by itself."""
    test: int = Field(120, ge=1)
    """Held-out samples of each task."""

    def check(self) -> None:
        super().check()
        self.check_apart()
        for name in self.names(self.audio.levels):
            study.variant(name, self.model, self.pretrain, self.audio.levels)

    def names(self, levels: int) -> list[str]:
        """The variants that are trained."""
        alone = [f"alone {rung.label}" for rung in study.ladder(self.model, levels)[1:]] if self.alone else []
        return ["elastic", "plain", *self.others, *alone]

    @model_validator(mode="after")
    def _known(self) -> ElasticConfig:
        for name in self.others:
            if name not in OTHERS:
                raise ValueError(f"others: got {name!r}; allowed are {', '.join(OTHERS)}")
        return self


def elastic(config: ElasticConfig, run: Run, session: Session) -> None:
    """Every variant of every seed, then tables, claims and figures."""
    data = read(config)
    tokenizers = get_tokenizers(config, run, session, data)
    get_corpus(config, run, session, tokenizers, data)
    levels = tokenizers.sizes.levels
    rungs, names = study.ladder(config.model, levels), config.names(levels)
    samples = ray.put([one for found in held_out(data, tokenizers, config.test).values() for one in found.samples])
    units: dict[str, Any] = {}
    for seed in range(config.seed, config.seed + config.seeds):
        for name in names:
            model, pretrain = study.variant(name, config.model, config.pretrain, levels)
            own = rungs if name in ("elastic", "plain") else rungs[:1]
            units[f"seed{seed}/{name}"] = (
                train_unit,
                (model, pretrain, run.path, samples, own, name == "elastic", seed, config.train),
            )
    found = run_stages(run, session, units, "elastic study")
    results = [
        {name: found[f"seed{seed}/{name}"] for name in names} for seed in range(config.seed, config.seed + config.seeds)
    ]
    report(run, results, names, rungs)


def train_unit(
    model: ModelSetting,
    pretrain: PretrainSetting,
    run: str,
    samples: list[Sample],
    rungs: list[study.Rung],
    timed: bool,
    seed: int,
    spread: Spread,
) -> dict[str, Any]:
    """One model in this process: trained, then measured at each rung on held-out samples."""
    bundle = train_beside(model, pretrain, run, seed, spread)
    seen = study.as_trained(Corpus.open(Storage(run)), pretrain.samples.model_dump())
    return study.examine(bundle, seen, samples, rungs, timed)


def report(run: Run, results: list[dict[str, Any]], names: list[str], rungs: list[study.Rung]) -> None:
    """Tables, claims and figures of all seeds."""
    whole = results[0]["elastic"]["rungs"]["whole"]
    lines = []
    for rung in rungs:
        told = results[0]["elastic"]["rungs"][rung.label]
        line: dict[str, Any] = {
            "sub-model": rung.label,
            "parameters": f"{told['total'] / whole['total']:.0%}",
            "active": f"{told['active'] / whole['active']:.0%}",
            "FLOPs": f"{told['flops'] / whole['flops']:.0%}",
            "time, view": times(results, rung.label, "view_s"),
            "time, cut": times(results, rung.label, "cut_s"),
        }
        for way, (variant, at) in ways(rung.label).items():
            if variant in names:
                line[way] = percent(study.ratio(results, (variant, at), ("plain", "whole")))
        lines.append(line)
    run.grid(f"Held-out loss over the whole plain model's (mean of logs over tasks), {len(results)} seeds", lines)
    run.grid(
        "Held-out losses (nats; lm, i2t, v2t, a2t a token, t2i, t2v a bit, t2a a code)",
        losses(run, results, names, rungs),
    )
    for claim in study.claims(results, [rung.label for rung in rungs]):
        run.claim(**claim)
    first = results[0]
    run.figure("ladder", figures.ladder(points(results, names, rungs)))
    for name in ("elastic", "plain", "separated"):
        if name in names:
            routing_figures(run, first[name]["routing"], first[name]["usage"], name)


def times(results: list[dict[str, Any]], rung: str, way: str) -> str:
    """Processor time for reading, over that of the whole model: mean over seeds."""
    ratios = [one["elastic"]["rungs"][rung][way] / one["elastic"]["rungs"]["whole"]["view_s"] for one in results]
    return f"{np.mean(ratios):.0%}"


def ways(rung: str) -> dict[str, tuple[str, str]]:
    """How a sub-model can be had: way -> (variant, rung)."""
    return {
        "view of the elastic run": ("elastic", rung),
        "plain model pruned": ("plain", rung),
        "trained alone": ("plain" if rung == "whole" else f"alone {rung}", "whole"),
    }


def percent(found: Interval) -> str:
    """An interval of log ratios as percent."""
    change = [100 * (np.exp(x) - 1) for x in (found.mean, found.low, found.high) if x is not None]
    return f"{change[0]:+.1f} %" + (f" [{change[1]:+.1f}, {change[2]:+.1f}]" if len(change) == 3 else "")


def losses(run: Run, results: list[dict[str, Any]], names: list[str], rungs: list[study.Rung]) -> list[dict[str, Any]]:
    """A line for each variant and rung; rows for summary.json."""
    lines = []
    for name in names:
        for rung in rungs if name in ("elastic", "plain") else rungs[:1]:
            line: dict[str, Any] = {"trained": name, "used": rung.label}
            for task in results[0][name]["rungs"][rung.label]["losses"]:
                found = study.loss(results, name, rung.label, task)
                run.row(f"loss {task}", found, trained=name, used=rung.label)
                line[task] = f"{found.mean:.3f}"
            lines.append(line)
    return lines


def points(results: list[dict[str, Any]], names: list[str], rungs: list[study.Rung]) -> list[dict[str, Any]]:
    """What the ladder's figure shows."""
    whole = results[0]["elastic"]["rungs"]["whole"]["flops"]
    return [
        {
            "label": rung.label,
            "flops": results[0]["elastic"]["rungs"][rung.label]["flops"] / whole,
            "ways": {
                way: float(np.exp(study.ratio(results, at, ("plain", "whole")).mean))
                for way, at in ways(rung.label).items()
                if at[0] in names
            },
        }
        for rung in rungs
    ]
