"""ERNIE 5.0 in small: one elastic ultra-sparse mixture of experts for text, image, video and audio, then reinforcement learning.

python -m jobs.ernie                  tokenizers, one model for all modalities, and a specialist beside it for each
python -m jobs.ernie tokenizers       the tokenizers alone, with their quality
python -m jobs.ernie pretrain         tokenizers, corpus, backbone; leaves an artifact for serve.ernie
python -m jobs.ernie elastic          sub-models of one run against models trained alone and pruning; ways of routing; maps
python -m jobs.ernie experts          which experts serve which task, of a run's artifact
python -m jobs.ernie evaluate         every task with a run's artifact, for any sub-model
python -m jobs.ernie export           a sub-model of a run as a model of its own
python -m jobs.ernie rl               reinforcement learning with verifiable rewards on four environments
python -m jobs.ernie sweep            any field with Ray Tune
"""

from __future__ import annotations

from typing import Any

import numpy as np
import ray
from pydantic import Field

from jobs.cli import start
from jobs.ernie_config import ErnieConfig, read
from jobs.ernie_elastic import ElasticConfig, elastic
from jobs.ernie_rl import RLConfig, rl
from jobs.ernie_show import show
from jobs.ernie_stages import get_corpus, get_tokenizers, held_out, pretrain_model, train_beside
from jobs.ernie_studies import STUDIES, quality
from raysys.runtime.progress import Progress
from raysys.runtime.run import Run
from raysys.runtime.seeds import Seeds, Stream
from raysys.runtime.session import Session
from raysys.runtime.statistics import Interval, bootstrap, mean_ci, paired_bootstrap
from raysys.runtime.train import TrainConfig as Spread
from raysys.systems.ernie.artifact import Bundle, save
from raysys.systems.ernie.setting import Counts, ModelSetting, PretrainSetting
from raysys.systems.ernie.study import OFF, as_trained
from raysys.systems.ernie.tasks import MEASURES, Tested, ceilings, measure

SPECIALISTS = {"text": ("lm",), "vision": ("t2i", "i2t", "t2v", "v2t"), "audio": ("t2a", "a2t")}
"""Models beside the one for all: of the same size, each trained on what the one sees of its tasks, in as many steps."""


class PretrainConfig(ErnieConfig):
    """Train tokenizers and backbone, and keep both for serving."""

    test: int = Field(100, ge=1)
    """Held-out items of each task that are measured."""


def pretrain(config: PretrainConfig, run: Run, session: Session) -> None:
    """Every seed; the first one's artifact is the run's."""
    data = read(config)
    tokenizers = get_tokenizers(config, run, session, data)
    get_corpus(config, run, session, tokenizers, data)
    items = held_out(data, tokenizers, config.test)
    results = []
    with Progress(config.seeds * config.pretrain.steps, "pretrain", unit="steps") as progress:
        for seed in range(config.seed, config.seed + config.seeds):
            bundle = pretrain_model(config, run, session, tokenizers, seed, progress)
            save(run.storage if seed == config.seed else run.storage.join(f"seeds/{seed}"), bundle)
            stage = run.stage(f"seed{seed}/measured")
            results.append(stage.result or stage.finish(examine(bundle, items, seed)))
    table(run, {"one model": results}, ceilings(bundle, items))


def examine(bundle: Bundle, items: dict[str, Tested], seed: int) -> dict[str, Any]:
    """Each measure of each task, item by item."""
    return {
        task: {k: v.tolist() for k, v in measure(bundle, task, found, seed).items()} for task, found in items.items()
    }


def over(results: list[dict[str, Any]], task: str, fact: str) -> Interval | None:
    """Mean over items with a bootstrap interval, or over seeds with a t interval where there are several."""
    values = [np.array(one[task][fact]) for one in results if fact in one.get(task, {})]
    if not values:
        return None
    if len(values) == 1:
        return bootstrap(values[0], lambda v: float(v.mean()), Seeds(0).rng(Stream.SHUFFLE))
    return mean_ci([v.mean() for v in values])


def paired(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], task: str, fact: str) -> Interval:
    """Mean of ours - theirs on the same items, over seeds and items."""
    values = [np.array([one[task][fact] for one in results]) for results in (ours, theirs)]
    return paired_bootstrap(*values, Seeds(0).rng(Stream.SHUFFLE))


def table(run: Run, methods: dict[str, list[dict[str, Any]]], best: dict[str, float]) -> None:
    """Every measure of every method, with chance and what the tokenizers alone would reach."""
    lines = []
    for m in MEASURES:
        found = {name: over(results, m.task, m.fact) for name, results in methods.items()}
        if not any(found.values()):
            continue
        line: dict[str, Any] = {"task": m.label, "chance": f"{m.chance:.2f}"}
        for name, interval in found.items():
            if interval is not None:
                run.row(f"{m.task} {m.fact}", interval, method=name)
                bounds = "" if interval.low is None else f" [{interval.low:.2f}, {interval.high:.2f}]"
                line[name] = f"{interval.mean:.2f}{bounds}"
        if f"{m.task} {m.fact}" in best:
            line["tokenizer alone"] = f"{best[f'{m.task} {m.fact}']:.2f}"
        lines.append(line)
        one = found.get("one model")
        if one is not None:
            better = one.above(m.chance) if m.more else one.below(m.chance)
            run.claim(f"{m.label}: better than chance", "Sections 2 and 6 (tasks of one unified model)", better, one)
        other = found.get("specialist")
        if one is not None and other is not None:
            gain = paired(methods["one model"], methods["specialist"], m.task, m.fact)
            good = not (gain.below(0) if m.more else gain.above(0))
            run.claim(
                f"{m.label}: the unified model is not significantly worse than the specialist", "Section 1", good, gain
            )
    run.grid("Tasks on held-out data (mean, 95 % interval)", lines)


# ---------------------------------------------------------------- the tour


class DemoConfig(PretrainConfig):
    """The tour: tokenizers, one model for all modalities by Ray Train, specialists beside it, and what it draws, says, sounds."""

    test: int = Field(80, ge=1)
    """Held-out items of each task that are measured."""
    items: int = Field(3000, ge=0)
    """Training items of each task that are used at most; 0 means all."""
    pretrain: PretrainSetting = PretrainSetting(steps=330, samples=Counts(t2i=12, v2t=4, a2t=2), elastic=OFF)
    """Training of the backbone: here without sub-models, which `elastic` compares (they slow such a short training down)."""


def demo(config: DemoConfig, run: Run, session: Session) -> None:
    """One model and the specialists at the same time, then the table and the figures."""
    data = read(config)
    tokenizers = get_tokenizers(config, run, session, data)
    run.grid("Tokenizers on held-out data", quality(tokenizers, data, config.test))
    corpus = get_corpus(config, run, session, tokenizers, data)
    items = held_out(data, tokenizers, config.test)
    stage, beside = run.stage("specialists"), None
    arguments = (config.model, config.pretrain, run.path, items, config.seed, config.train)
    if stage.result is None and config.execution == "actors" and room(config.train):
        beside = ray.remote(specialists).options(num_cpus=1).remote(*arguments)
    with Progress(config.pretrain.steps, "one model (specialists beside it)", unit="steps") as progress:
        bundle = pretrain_model(config, run, session, tokenizers, config.seed, progress)
    save(run.storage, bundle)
    measured = run.stage("measured")
    one = measured.result or measured.finish(examine(bundle, items, config.seed))
    if stage.result is None:
        stage.finish(specialists(*arguments) if beside is None else ray.get(beside))
    table(run, {"one model": [one], "specialist": [stage.result or {}]}, ceilings(bundle, items))
    show(run, bundle, items, as_trained(corpus, config.pretrain.samples.model_dump()), config.seed)


def room(spread: Spread) -> bool:
    """Whether the cluster has a CPU besides those of the training's workers."""
    return bool(ray.cluster_resources().get("CPU", 0.0) >= spread.workers * spread.cpus_per_worker + 1)


def specialists(
    model: ModelSetting, pretrain: PretrainSetting, run: str, items: dict[str, Tested], seed: int, spread: Spread
) -> dict[str, Any]:
    """A model for each modality, trained on its tasks alone: the same samples in the same steps as the model for all."""
    found = dict[str, Any]()
    for tasks in SPECIALISTS.values():
        counts = {task: n if task in tasks else 0 for task, n in pretrain.samples.model_dump().items()}
        if not any(counts.values()):
            continue
        own = pretrain.with_values({"samples": Counts(**counts).model_dump()})
        bundle = train_beside(model, own, run, seed, spread)
        found |= examine(bundle, {task: items[task] for task in tasks if task in items and counts[task]}, seed)
    return found


def main() -> None:
    """Entry point of `python -m jobs.ernie`."""
    commands = {
        "demo": (DemoConfig, demo),
        "pretrain": (PretrainConfig, pretrain),
        "elastic": (ElasticConfig, elastic),
        "rl": (RLConfig, rl),
        **STUDIES,
    }
    start("ernie", commands, default="demo", description=__doc__ or "")


if __name__ == "__main__":
    main()
