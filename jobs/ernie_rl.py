"""Unified multimodal reinforcement learning on verifiable environments, and its ablations on paired seeds.

Notable choices
- Each seed has a warm start of its own, which all its arms share: differences between arms are paired.
- The base arm draws its answers by rollout actors and commits a checkpoint every so many iterations. Other arms are Ray tasks of
  one process each: an arm's numbers do not depend on who draws, so both are the same computation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import numpy as np
import ray
import torch
from pydantic import Field

from actors.rollout import Rollers
from jobs.ernie_config import ErnieConfig, read
from jobs.ernie_stages import fetched, get_corpus, get_tokenizers, pretrain_model
from raysys.data.multimodal import Form
from raysys.runtime.checkpoint import read_state, write_state
from raysys.runtime.pool import run_stages
from raysys.runtime.progress import Progress
from raysys.runtime.run import Run, Stage
from raysys.runtime.session import Session
from raysys.runtime.train import fit, fit_here
from raysys.systems.ernie.artifact import Bundle, describe, load, save
from raysys.systems.ernie.rl import report
from raysys.systems.ernie.rl.arms import ARMS, BASE, arm
from raysys.systems.ernie.rl.loop import Hands, Loop
from raysys.systems.ernie.rl.material import Material
from raysys.systems.ernie.rl.policy import Weights, weights_of
from raysys.systems.ernie.rl.questions import SPARE, Questions, ask, turns_of
from raysys.systems.ernie.rl.reading import Reader
from raysys.systems.ernie.rl.rollout import InProcess, Worker
from raysys.systems.ernie.rl.setting import RLSetting, WarmSetting
from raysys.systems.ernie.rl.warm import WarmStart

Row = dict[str, float]


class RLConfig(ErnieConfig):
    """Warm start, then unified reinforcement learning on arithmetic, images, sound and video; ablations on paired seeds."""

    free_on_resume: ClassVar[frozenset[str]] = ErnieConfig.free_on_resume | {"rollout_actors", "cpus_per_actor"}

    run: str = ""
    """Run folder (path or URI) whose model is the start; by default one is trained here first."""
    warm: WarmSetting = WarmSetting()
    """Supervised start."""
    rl: RLSetting = RLSetting()
    """Reinforcement learning; the base arm."""
    arms: list[str] = Field([])
    """Ablations to run beside the base arm: synchronous, "depth 4", gspo, grpo, dapo, wpsm, hints, noise, ...; all is all."""
    seeds: int = Field(3, ge=1, le=10_000)
    """Paired repetitions of every arm."""
    tuning: bool = False
    """Measure on held-out questions that no report uses (sums: most of them are the same), for choosing constants."""
    rollout_actors: int = Field(1, ge=1, le=10_000)
    """Actors that draw the base arm's answers. Their number changes no bit of the result."""
    cpus_per_actor: float = Field(1.0, ge=0)
    """CPUs reserved for a rollout actor."""
    every: int = Field(10, ge=1)
    """Iterations between checkpoints of the base arm."""

    @property
    def chosen(self) -> list[str]:
        """The arms beside the base."""
        return [name for name in ARMS if name != BASE and (name in self.arms or "all" in self.arms)]

    def check(self) -> None:
        told = describe(self.run).model if self.run else None
        self.check_train(told or self.model)
        for name in self.arms:
            if name != "all":
                arm(name, self.rl)
        if self.warm.blocks % self.train.workers:
            raise ValueError(
                f"train.workers: got {self.train.workers}; it must divide warm.blocks, which is {self.warm.blocks}"
            )
        form = describe(self.run).form if self.run else self.form
        if form.height != form.width:
            raise ValueError(f"form: got images of {form.height} x {form.width}; the environments draw squares")
        if not self.run:
            super().check()


def rl(config: RLConfig, run: Run, session: Session) -> None:
    """Every seed and arm, then the table, claims and figure."""
    bundle = base_model(config, run, session)
    material = gather(config, bundle)
    actors = config.execution == "actors"
    shared = ray.put(material) if actors else material
    first, found = weights_of(bundle.model), dict[str, dict[str, Any]]()
    seeds = range(config.seed, config.seed + config.seeds)
    units: dict[str, tuple[Callable[..., Mapping[str, Any]], tuple[Any, ...]]] = {}
    for seed in seeds:
        weights = warm_start(config, run, session, shared, material, first, seed)
        name = f"seed{seed}/{BASE}"
        found[name] = base_arm(config, run, session, shared, material, weights, seed)
        if seed == config.seed:
            policy = material.policy(trained_weights(run.stage(name), material))
            save(run.storage, bundle.with_model(policy.module.requires_grad_(False)))
        given = ray.put(weights) if actors and config.chosen else weights
        units |= {f"seed{seed}/{one}": (play_arm, (shared, given, arm(one, config.rl), seed)) for one in config.chosen}
    if actors and units:
        found |= run_stages(run, session, units, "ablations")
    else:
        for name, (function, given) in units.items():
            stage = run.stage(name)
            found[name] = stage.result or stage.finish(function(*given))
    arms = [BASE, *config.chosen]
    results = {one: [found[f"seed{seed}/{one}"] for seed in seeds] for one in arms}
    report.tell(run, results, config.rl.environments)


def base_model(config: RLConfig, run: Run, session: Session) -> Bundle:
    """The model that another run left, or one that is trained here."""
    if config.run:
        return load(config.run)
    data = read(config)
    tokenizers = get_tokenizers(config, run, session, data)
    get_corpus(config, run, session, tokenizers, data)
    with Progress(config.pretrain.steps, "backbone", unit="steps") as progress:
        return pretrain_model(config, run, session, tokenizers, config.seed, progress)


def gather(config: RLConfig, bundle: Bundle) -> Material:
    """All questions, as the model reads them."""
    form = Form(**bundle.form.model_dump())
    options = config.rl.difficulty.options(form.height, form)
    reader = Reader(bundle.text, bundle.visual, bundle.audio, form.channels)
    names = config.rl.environments
    put = partial(ask, names, options, read=reader.prompt, encode=bundle.text.encode)
    first = 0 if config.tuning else SPARE
    train, test = (
        put(split="train", seeds=range(config.rl.prompts)),
        put(split="test", seeds=range(first, first + config.rl.test)),
    )
    weights = config.rl.weights.model_dump()
    questions = Questions(names, train, test, 0, turns_of([weights[name] for name in names]))
    warm = tuple(put(split="train", seeds=range(SPARE, SPARE + config.warm.samples)))
    model = bundle.model
    return Material(model.setting, model.sizes, model.mtp is not None, bundle.text.to_bytes(), options, questions, warm)


def warm_start(
    config: RLConfig, run: Run, session: Session, shared: Any, material: Material, first: Weights, seed: int
) -> Weights:
    """The weights after supervised training on reference traces."""
    if not config.warm.steps:
        return first
    stage = run.stage(f"seed{seed}/warm")
    given = ray.put(dict(first)) if config.execution == "actors" else first
    make = partial(make_warm, shared, given, config.warm, seed)
    with Progress(config.warm.steps, f"warm start, seed {seed}", unit="steps") as progress:
        if config.execution == "actors":
            state = fit(stage, session, make, config.train, progress=progress)
            session.release()
        else:
            state = fit_here(stage, make, config.train, progress=progress)
    return {**first, **{name: value.numpy() for name, value in state.items()}}


def make_warm(shared: Any, given: Any, setting: WarmSetting, seed: int, device: str) -> WarmStart:
    """The learner of the warm start, in whatever process it is trained."""
    material: Material = fetched(shared)
    policy = material.policy(fetched(given))
    policy.module.to(device)
    return WarmStart(policy, setting, material.warm, seed)


def make_worker(material: Material, setting: RLSetting, seed: int) -> Worker:
    """A rollout actor's worker."""
    return material.worker(setting, seed)


def base_arm(
    config: RLConfig, run: Run, session: Session, shared: Any, material: Material, weights: Weights, seed: int
) -> dict[str, Any]:
    """The base arm of a seed, from its last checkpoint, with rollout actors or in this process."""
    stage = run.stage(f"seed{seed}/{BASE}")
    if stage.result is not None:
        return stage.result
    rollers = None
    hands: Hands
    if config.execution == "actors":
        hands = rollers = Rollers.spawn(
            session, make_worker, (shared, config.rl, seed), count=config.rollout_actors, cpus=config.cpus_per_actor
        )
    else:
        hands = InProcess(material.worker(config.rl, seed))
    torch.set_num_threads(1)
    loop = Loop(material.policy(weights), hands, material.asked(seed), config.rl)
    try:
        with Progress(config.rl.iterations, f"reinforcement, seed {seed}", unit="iterations") as progress:
            return stage.finish(play(loop, stage, config.every, progress))
    finally:
        if rollers is not None:
            rollers.stop()


def play_arm(shared: Any, weights: Any, setting: RLSetting, seed: int) -> dict[str, Any]:
    """One arm of one seed, in this process."""
    torch.set_num_threads(1)
    material: Material = fetched(shared)
    hands = InProcess(material.worker(setting, seed))
    return play(Loop(material.policy(fetched(weights)), hands, material.asked(seed), setting))


def play(loop: Loop, stage: Stage | None = None, every: int = 10, progress: Progress | None = None) -> dict[str, Any]:
    """All iterations that are left; rewards before and after, and what was measured on the way."""
    before, rows = begun(loop, stage)
    if progress is not None:
        progress.advance(loop.iteration)
    last = loop.setting.iterations
    while loop.iteration < last:
        rows.append(loop.iterate())
        t = loop.iteration
        if stage is not None:
            stage.log(t - 1, **rows[-1])
            if t % every == 0 or t == last:
                keep(loop, stage, before, rows)
        if progress is not None:
            progress.advance()
            progress.note(f"reward {rows[-1]['reward']:.2f}")
    after = {name: rewards.mean(1).tolist() for name, rewards in loop.evaluate().items()}
    names = list(dict.fromkeys(name for row in rows for name in row))
    return {"before": before, "after": after, "rows": {name: [row.get(name) for row in rows] for name in names}}


def begun(loop: Loop, stage: Stage | None) -> tuple[dict[str, list[float]], list[Row]]:
    """Rewards before the first iteration and the rows so far; the loop goes on from the stage's last checkpoint."""
    found = stage.checkpoints.latest() if stage is not None else None
    if stage is not None:
        stage.rewind(found.round if found else 0)
    if found is None or stage is None:
        loop.prepare()
        return {name: rewards.mean(1).tolist() for name, rewards in loop.evaluate().items()}, []
    ((file, digest),) = found.files.items()
    tensors, meta = read_state(stage.run.storage, file, digest)
    loop.load(tensors, meta)
    return found.meta["before"], list(found.meta["rows"])


def keep(loop: Loop, stage: Stage, before: dict[str, list[float]], rows: list[Row]) -> None:
    """Commit a checkpoint."""
    tensors, meta = loop.state()
    file = f"{stage.checkpoints.folder(loop.iteration)}/state.safetensors"
    digest = write_state(stage.run.storage, file, tensors, meta)
    stage.checkpoints.commit(loop.iteration, {file: digest}, {"before": before, "rows": rows})


def trained_weights(stage: Stage, material: Material) -> Weights:
    """The weights of a finished base arm."""
    found = stage.checkpoints.latest()
    if found is None:
        raise RuntimeError(f"stage {stage.name!r} is finished, but its last checkpoint is damaged")
    ((file, digest),) = found.files.items()
    tensors, _ = read_state(stage.run.storage, file, digest)
    return {
        name.removeprefix("module/"): np.asarray(value) for name, value in tensors.items() if name.startswith("module/")
    }
