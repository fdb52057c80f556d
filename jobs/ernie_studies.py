"""The ERNIE commands that train no backbone of their own: tokenizers, routing maps, evaluation; and the sweep."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import numpy as np
import ray
import torch
from pydantic import Field

from jobs.cli import ClusterJob, Commands
from jobs.ernie_config import ErnieConfig, read
from jobs.ernie_show import show_routing
from jobs.ernie_stages import get_corpus, get_tokenizers, half, held_out, train_beside
from jobs.sweeps import SweepFlags, run_sweep
from raysys.data.multimodal import Form, Multimodal, load_multimodal
from raysys.runtime.run import Run
from raysys.runtime.seeds import Seeds, Stream
from raysys.runtime.session import Session
from raysys.runtime.statistics import bootstrap
from raysys.systems.ernie import study
from raysys.systems.ernie.artifact import Bundle, Tokenizers, describe, load, save
from raysys.systems.ernie.cut import cost, cut
from raysys.systems.ernie.elastic import SubModel
from raysys.systems.ernie.evaluate import batches, held_out_losses
from raysys.systems.ernie.routing import loads
from raysys.systems.ernie.samples import samples_of
from raysys.systems.ernie.stream import Sample
from raysys.systems.ernie.tasks import MEASURES, measure
from raysys.systems.ernie.tokenizers.audio_training import report as audio_report
from raysys.systems.ernie.tokenizers.text import report as text_report
from raysys.systems.ernie.tokenizers.visual_training import report as visual_report


def quality(tokenizers: Tokenizers, data: Multimodal, count: int) -> list[dict[str, Any]]:
    """What the tokenizers lose on held-out data."""
    lines = []
    for task, label in (("t2i", "images"), ("t2v", "videos")):
        if task in data.tasks:
            frames = torch.from_numpy(
                np.stack([item.frames for item in half(data, task)[:count] if item.frames is not None])
            )
            lines += [
                {"tokenizer": f"visual, {label}", "measure": k, "value": f"{v:.4g}"}
                for k, v in visual_report(tokenizers.visual, frames).items()
            ]
    if "t2a" in data.tasks:
        waves = torch.from_numpy(np.stack([item.wave for item in half(data, "t2a")[:count] if item.wave is not None]))
        lines += [
            {"tokenizer": "audio", "measure": k, "value": f"{v:.4g}"}
            for k, v in audio_report(tokenizers.audio, waves).items()
        ]
    if "lm" in data.tasks:
        texts = [item.text for item in half(data, "lm")[:count]]
        lines += [
            {"tokenizer": "text", "measure": k, "value": f"{v:.3g}"}
            for k, v in text_report(tokenizers.text, texts).items()
        ]
    return lines


class TokenizersConfig(ErnieConfig):
    """Train the tokenizers alone; pretrain takes them with --tokenizers RUN."""

    test: int = Field(200, ge=1)
    """Held-out items that they are measured on."""


def train_tokenizers(config: TokenizersConfig, run: Run, session: Session) -> None:
    """Train and measure."""
    data = read(config)
    tokenizers = get_tokenizers(config, run, session, data)
    run.grid("Tokenizers on held-out data", quality(tokenizers, data, config.test))


# ---------------------------------------------------------------- of an artifact


class ExpertsConfig(ClusterJob):
    """Which experts serve which task, layer by layer, in a run's artifact."""

    run: str = ""
    """Run folder (path or URI) that pretrain or demo made."""
    data: str = ""
    """Data set, as for pretrain; by default the one that the run was trained on."""
    test: int = Field(100, ge=1)
    """Held-out items of each task."""

    @property
    def distributed(self) -> bool:
        return False

    def check(self) -> None:
        if not self.run:
            raise ValueError("run: is missing; expected the folder of a run that pretrain made")
        told = describe(self.run)
        load_multimodal(self.data or told.data, self.seed, Form(**told.form.model_dump()))


def opened(config: ExpertsConfig) -> tuple[Bundle, Multimodal]:
    """The artifact and the data it is tried on."""
    bundle = load(config.run)
    return bundle, load_multimodal(config.data or bundle.data, config.seed, Form(**bundle.form.model_dump()))


def training(data: Multimodal, bundle: Bundle) -> list[Sample]:
    """Training samples of so many steps, as often of each task as the model was trained on it (`study.as_trained`)."""
    counts = bundle.samples.model_dump().items()
    return [
        one
        for task, n in counts
        if task in data.tasks
        for one in samples_of(bundle, data.train(task)[: n * study.STEPS])
    ]


def experts(config: ExpertsConfig, run: Run, session: Session) -> None:
    """Figures and tables of usage, entropy and overlap."""
    bundle, data = opened(config)
    told = show_routing(run, bundle, held_out(data, bundle, config.test), training(data, bundle))
    run.stage("routing").finish(told)


class EvaluateConfig(ExpertsConfig):
    """Every task with a run's artifact, whole or as a sub-model."""

    sub: Literal["whole", "all"] = "whole"
    """all: every rung of the ladder of sub-models, too."""


def evaluate(config: EvaluateConfig, run: Run, session: Session) -> None:
    """Tasks and held-out losses of the whole model and, if asked for, of its sub-models."""
    bundle, data = opened(config)
    items = held_out(data, bundle, config.test)
    setting, levels = bundle.model.setting, bundle.model.levels
    samples = [one for found in items.values() for one in found.samples]
    counts = loads(bundle.model, batches(bundle, training(data, bundle)))
    losses, lines = [], {m: {"task": m.label, "chance": f"{m.chance:.2f}"} for m in MEASURES if m.task in items}
    for rung in study.ladder(setting, levels)[: None if config.sub == "all" else 1]:
        sub = rung.of(setting, levels, counts)
        found = held_out_losses(bundle, samples, sub)
        losses.append({"sub-model": rung.label, **{task: f"{value:.3f}" for task, value in found.items()}})
        for task, tried in items.items():
            values = measure(bundle, task, tried, config.seed, sub)
            for m, line in lines.items():
                if m.task == task and m.fact in values:
                    rng = Seeds(0).rng(Stream.SHUFFLE)
                    interval = bootstrap(values[m.fact], lambda v: float(v.mean()), rng)
                    run.row(f"{m.task} {m.fact}", interval, sub_model=rung.label)
                    line[rung.label] = f"{interval.mean:.2f}"
    run.grid(f"Tasks on held-out data (up to {config.test} items each)", list(lines.values()))
    run.grid("Held-out losses (nats a token, bit or code)", losses)


class ExportConfig(ExpertsConfig):
    """A sub-model of a run as a model of its own, which evaluate, rl and serve.ernie take as any other run."""

    dropped: int = Field(0, ge=0)
    """Middle layers that are left out, the last ones; never the first layer, nor those that predict audio codes."""
    share: float = Field(1.0, gt=0, le=1)
    """Part of the experts of each layer that stays: those that training data uses most."""
    active: int | None = Field(None, ge=1)
    """Active experts of a token; by default as many as the run's model has."""

    def check(self) -> None:
        super().check()
        told = describe(self.run)
        if told.model is None:
            raise ValueError(f"run: got {self.run}, which holds tokenizers but no model")
        middle = told.model.layers - 1 - told.audio.levels
        if self.dropped > max(0, middle):
            raise ValueError(f"dropped: got {self.dropped}; the model has {max(0, middle)} layers that can be left out")
        most = min(told.model.active, max(1, round(self.share * told.model.experts)))
        if (self.active or told.model.active) > most:
            raise ValueError(f"active: got {self.active or told.model.active}; this sub-model has at most {most}")
        if told.model.routing == "separated" and self.share < 1:
            raise ValueError(f"share: got {self.share}; a model with separated routing keeps all experts")


def export(config: ExportConfig, run: Run, session: Session) -> None:
    """Cut the sub-model out, save it, and measure both on held-out data: they are equal."""
    bundle, data = opened(config)
    model = bundle.model
    rung = study.Rung("exported", config.dropped, config.share, config.active)
    sub = rung.of(model.setting, model.levels, loads(model, batches(bundle, training(data, bundle))))
    own = bundle.with_model(cut(model, sub))
    save(run.storage, own)
    samples = [one for found in held_out(data, bundle, config.test).values() for one in found.samples]
    lines = []
    for name, losses, one in (
        ("whole", held_out_losses(bundle, samples), SubModel.full(model.setting)),
        ("view", held_out_losses(bundle, samples, sub), sub),
        ("exported", held_out_losses(own, samples), sub),
    ):
        told = cost(model, one, study.CONTEXT)
        sizes = {"parameters": f"{told.total:,}", "active": f"{told.active:,}"}
        lines.append({"model": name, **sizes, **{task: f"{value:.3f}" for task, value in losses.items()}})
    run.grid("Held-out losses (nats a token, bit or code)", lines)


# ---------------------------------------------------------------- sweep


class SweepConfig(SweepFlags, ErnieConfig):
    """Any field of the model or its training, with Ray Tune; tokenizers and corpus are made once."""

    space: list[str] = Field(["model.bias_speed=1e-3,3e-3,1e-2", "pretrain.elastic.depth=0.0,0.25"], min_length=1)
    """What varies: field=a,b,c or field=low..high, with :log or :int for a logarithmic or whole range."""
    metric: str = "mean_log_loss"
    """What decides: mean_log_loss over tasks, or the held-out loss of a task, such as t2i."""
    mode: Literal["max", "min"] = "min"
    """Whether more or less of the metric is better."""
    test: int = Field(60, ge=1)
    """Held-out samples of each task: others than those that reports are about."""

    def check(self) -> None:
        super().check()
        self.check_apart()
        metrics = {"mean_log_loss", *(task for task, n in self.pretrain.samples.model_dump().items() if n)}
        fields = {f"model.{name}" for name in type(self.model).model_fields}
        fields |= {f"pretrain.{name}" for name in type(self.pretrain).model_fields}
        fields |= {f"pretrain.elastic.{name}" for name in type(self.pretrain.elastic).model_fields}
        self.check_search(fields, metrics, 1)


def sweep(config: SweepConfig, run: Run, session: Session) -> None:
    """A trial is a pre-training in its own process, measured once at its end."""
    data = read(config)
    tokenizers = get_tokenizers(config, run, session, data)
    get_corpus(config, run, session, tokenizers, data)
    samples = [one for found in held_out(data, tokenizers, config.test, True).values() for one in found.samples]
    run_sweep(
        config, run, session, partial(trial, ErnieConfig.of(shared_fields(config)), run.path, ray.put(samples)), 1
    )


def shared_fields(config: ErnieConfig) -> dict[str, Any]:
    """The values of the fields that every command has."""
    return {name: getattr(config, name) for name in ErnieConfig.model_fields}


def trial(config: ErnieConfig, run: str, samples: Any, values: dict[str, Any], report: Callable[..., None]) -> None:
    """A pre-training with these values; reports held-out losses."""
    changed = config.with_values(values)
    bundle = train_beside(changed.model, changed.pretrain, run, changed.seed, changed.train)
    found = held_out_losses(bundle, ray.get(samples))
    report(1, **found, mean_log_loss=float(np.mean(np.log(list(found.values())))))


STUDIES: Commands = {
    "tokenizers": (TokenizersConfig, train_tokenizers),
    "experts": (ExpertsConfig, experts),
    "evaluate": (EvaluateConfig, evaluate),
    "export": (ExportConfig, export),
    "sweep": (SweepConfig, sweep),
}
