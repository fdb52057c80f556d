"""Decentralised LoRA over changing graphs: fine-tune a frozen language model among peers, without a server.

python -m jobs.tad_lora                 the regression problem with its exact optimum, then a short run on text over Ray actors
python -m jobs.tad_lora train           one method beside others, over Ray actors; saves peft adapters
python -m jobs.tad_lora compare         methods x graph processes, each method's step size tuned by the same rule
python -m jobs.tad_lora theory          the switching interval against connectivity, on the regression problem
python -m jobs.tad_lora sweep           interval x step size (or any field) with Ray Tune
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from actors.group import NodeGroup
from actors.peer import Peer
from jobs.cli import ClusterJob, add, start
from jobs.tad_lora_compare import CompareConfig, compare
from jobs.tad_lora_theory import STUDIES, TheoryConfig, theory
from raysys.runtime.blocks import blocks
from raysys.runtime.participants import Local, Participant, State
from raysys.runtime.progress import Progress
from raysys.runtime.rounds import Rounds
from raysys.runtime.run import Run, Stage
from raysys.runtime.session import Session
from raysys.runtime.statistics import mean_ci
from raysys.systems.tad_lora import claims, figures
from raysys.systems.tad_lora.artifact import save_adapters
from raysys.systems.tad_lora.evaluation import evaluate
from raysys.systems.tad_lora.policies import METHODS, make_policy
from raysys.systems.tad_lora.presets import PRESETS
from raysys.systems.tad_lora.setting import Setting
from raysys.systems.tad_lora.simulate import Simulation
from raysys.systems.tad_lora.task import Task, check_task


class TrainConfig(ClusterJob, Setting):
    """Fine-tune with one method, beside others at the same step size, over Ray actors."""

    presets: ClassVar = PRESETS

    beside: list[str] = Field(["lora", "rolora", "ffa", "local"])
    """Methods run beside it on the same seeds, data, graphs and batches."""
    block: int = Field(5, ge=1)
    """Peers stepped together in one batch. A block never spans two hosts, so the layout cannot change a number."""
    log_every: int = Field(1, ge=1)
    """Rounds between measurements of the cross term and the disagreements. Models are tested in measured rounds only."""
    execution: Literal["actors", "inprocess"] = "actors"
    """actors: peers are Ray actors that exchange object references; inprocess: the same numbers in this process."""

    @model_validator(mode="after")
    def _beside(self) -> Self:
        for method in self.beside:
            if method not in METHODS:
                raise ValueError(f"beside: got {method!r}; allowed are {', '.join(METHODS)}")
            self.arm(method)
        return self

    @property
    def distributed(self) -> bool:
        return self.execution == "actors"

    def check(self) -> None:
        check_task(Task(self.arm(self.method), self.seed))

    def arm(self, method: str) -> Setting:
        """The setting of one of the compared methods."""
        own = Setting.of({name: getattr(self, name) for name in Setting.model_fields})
        return own if method == self.method else own.with_method(method)

    @property
    def methods(self) -> list[str]:
        """What is compared, the method itself first."""
        return list(dict.fromkeys([self.method, *self.beside]))


def train(config: TrainConfig, run: Run, session: Session) -> None:
    """Every method on every seed, one after the other; then the comparison, and the adapters of the first seed."""
    seeds = range(config.seed, config.seed + config.seeds)
    units = [(method, seed) for method in config.methods for seed in seeds]
    rounds = {unit: Task(config.arm(unit[0]), unit[1]).rounds for unit in units}
    done = sum(rounds[m, s] for m, s in units if run.stage(f"{m}/seed{s}").result is not None)
    results: dict[str, list[dict[str, Any]]] = {method: [] for method in config.methods}
    with Progress(sum(rounds.values()), "train", done=done) as progress:
        for method, seed in units:
            stage = run.stage(f"{method}/seed{seed}")
            if stage.result is None:
                progress.note(f"{method}, seed {seed}")
                train_once(config, config.arm(method), seed, stage, session, progress)
            results[method].append(stage.result or {})
    report(config, run, results)


def train_once(
    config: TrainConfig, setting: Setting, seed: int, stage: Stage, session: Session, progress: Progress
) -> None:
    """One run from its last barrier to its end."""
    task = Task(setting, seed, "cuda" if config.cluster.gpus_per_host else "cpu")
    loop = partial(
        Rounds,
        stage,
        task.rounds,
        snapshot_every=config.cluster.snapshot_every,
        log_every=config.log_every,
        timeout_s=config.cluster.timeout_s,
        progress=progress,
    )
    if config.execution == "actors":
        states, last, counts = peer_to_peer(task, loop, session, config.block)
    else:
        states, last, counts = in_process(task, loop, config.block)
    stage.run.count(messages=counts["messages"], bytes=counts["bytes"])
    right = np.concatenate([state["right"] for state in last]).astype(np.float64)
    curve = stage.run.metrics.rows(stage.name)
    result = {k: v for k, v in curve[-1].items() if k not in ("stage", "round", "t")}
    intervals = sorted({int(T) for state in states for T in state["intervals"]})
    interval = int(states[0]["interval"])
    if len(intervals) > 1 or counts["unsettled"]:
        why = f"T found: {intervals}, {counts['unsettled']} peers unsure; more --probe-rounds would settle it"
        stage.run.event("peers may disagree on T", stage=stage.name, reason=why)
    if setting.problem == "text" and setting.method == config.method and seed == config.seed:
        factors = [np.concatenate([state[name] for state in states]) for name in ("a", "b")]
        if make_policy(setting.method, max(interval, 1)).changes_base:
            stage.run.event(
                "no adapters", reason=f"{setting.method} changes the frozen weights, which no adapter holds"
            )
        else:
            save_adapters(stage.run.storage, task, *factors)
    stage.finish(
        result | counts | {"curve": curve, "interval": interval, "peers": right.mean(1), "items": right.mean(0)}
    )


Loop = Callable[[list[Participant]], Rounds]
Outcome = tuple[list[State], list[State], dict[str, int]]
"""The blocks' states, their statistics after the last round, and counts."""


def peer_to_peer(task: Task, loop: Loop, session: Session, block: int) -> Outcome:
    """Peers train a factor, exchange references to what their method mixes, and mix it by the graph of the round."""
    n = task.setting.peers
    peers = NodeGroup.spawn(
        session, Peer, task.peers, blocks(task.nodes, block), n, partial(evaluate, task), name="peers"
    )
    rounds = loop([peers])
    for t in rounds:
        peers.exchange(t, peers.train(t))
        if t >= task.delay and rounds.due(t):
            rounds.log(t, peers.evaluate(peers.statistics(t)))
    states = rounds.after(lambda: [state for _, state in peers.snapshot()])
    last = rounds.after(lambda: [state for host in peers.each("statistics", task.rounds - 1) for state in host])
    counts = rounds.after(lambda: peers.counters() | add(*peers.each("outcomes")))
    peers.stop()
    return states, last, counts


def in_process(task: Task, loop: Loop, block: int) -> Outcome:
    """The same objects in this process, without Ray."""
    simulated = Simulation(task, block)
    rounds = loop([Local(name, part) for name, part in simulated.parts().items()])
    for t in rounds:
        simulated.step(t)
        if t >= task.delay and rounds.due(t):
            rounds.log(t, simulated.evaluate(t))
    states = [peers.state_dict() for peers in simulated.blocks]
    last = [peers.statistics(task.rounds - 1) for peers in simulated.blocks]
    counts = {"messages": simulated.messages, "bytes": simulated.bytes, "refused": 0}
    return states, last, counts | add(*(peers.outcomes() for peers in simulated.blocks))


def report(config: TrainConfig, run: Run, results: dict[str, list[dict[str, Any]]]) -> None:
    """Table, figures and claims of a comparison at one step size."""
    score = "error" if config.problem == "regression" else "accuracy"
    lines = []
    for method, each in results.items():
        line: dict[str, Any] = {"method": method, "T": each[0]["interval"] or "-"}
        for metric, label, unit, digits in figures.reported(score):
            values = [result[metric] for result in each if result.get(metric) is not None]
            if len(values) < len(each):
                line[label] = "diverged"
            else:
                interval = mean_ci(values)
                run.row(metric, interval, method=method, topology=config.topology)
                line[label] = f"{unit * interval.mean:.{digits}f}"
        lines.append(line | {"MB sent": f"{np.mean([result['bytes'] for result in each]) / 1e6:.1f}"})
    where = "Ray actors" if config.execution == "actors" else "this process"
    run.grid(
        f"{config.peers} peers over {config.topology}, {where}, lr {config.lr:g}, mean of {config.seeds} seeds", lines
    )
    curves = {method: [result["curve"] for result in each] for method, each in results.items()}
    run.figure("curves", figures.score_curves(curves, score))
    run.figure("cross-term", figures.cross_term_curves(curves))
    whole = {method: each for method, each in results.items() if all(result.get(score) is not None for result in each)}
    if config.seeds > 1 and config.method in whole:
        for claim in claims.train_claims(whole, config.method, score):
            run.claim(**claim)


class DemoConfig(TrainConfig):
    """The tour: the regression problem over connectivity, then text among peers over Ray actors."""

    data: str = "grammar(difficulty=0.3)"
    """Texts (see train --data)."""
    examples: int = Field(1500, ge=0)
    """Training texts used in all."""
    test: int = Field(200, ge=1)
    """Held-out texts that every peer's model is tested on."""
    layers: int = Field(1, ge=0, le=1000)
    """Top transformer layers that get adapters."""
    rounds: int = Field(20, ge=1)
    """Communication rounds R."""
    steps: int = Field(6, ge=1)
    """Local steps K per round."""
    lr: float = Field(1e-2, gt=0)
    """Step size, the same for all methods here; `compare` tunes it for each."""
    topology: str = "erdos_renyi(p=0.05)"
    """Graph process (see train --topology)."""


def demo(config: DemoConfig, run: Run, session: Session) -> None:
    """Both halves in one run folder and one report."""
    shared = {name: getattr(config, name) for name in config.model_fields_set & {"seed", "cluster"}}
    theory(TheoryConfig.of({**shared, "seeds": 5, "p": [0.5, 0.1, 0.02], "rounds": 300}), run, session)
    session.release()
    train(config, run, session)


def main() -> None:
    """Entry point of `python -m jobs.tad_lora`."""
    commands = {
        "demo": (DemoConfig, demo),
        "train": (TrainConfig, train),
        "compare": (CompareConfig, compare),
        **STUDIES,
    }
    start("tad_lora", commands, default="demo", description=__doc__ or "")


if __name__ == "__main__":
    main()
