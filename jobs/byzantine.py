"""Byzantine-robust distributed SGD: train over Ray actors, attack every rule, check the theory.

python -m jobs.byzantine                 train one rule against its baselines, over Ray actors
python -m jobs.byzantine demo            the same, then every rule against every attack
python -m jobs.byzantine matrix          every rule against every attack
python -m jobs.byzantine theory          error floors against bounds; momentum; the gossip phase transition
python -m jobs.byzantine audit           how robust a rule really is, your own included
python -m jobs.byzantine sweep           hyperparameters with Ray Tune
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from actors.adversary import Adversary, PeerAdversary
from actors.client import Client
from actors.group import NodeGroup, ServerGroup
from actors.peer import Peer
from jobs.byzantine_matrix import MatrixConfig, check_data, matrix
from jobs.byzantine_studies import STUDIES
from jobs.cli import ClusterJob, add, start
from raysys.aggregation import BLOCK, make_rule
from raysys.runtime.blocks import blocks
from raysys.runtime.checkpoint import write_state
from raysys.runtime.participants import Local, Participant
from raysys.runtime.progress import Progress
from raysys.runtime.rounds import Rounds
from raysys.runtime.run import Run, Stage
from raysys.runtime.session import Session
from raysys.runtime.statistics import mean_ci
from raysys.systems.byzantine import claims, figures
from raysys.systems.byzantine.evaluation import evaluate_peers, evaluate_server
from raysys.systems.byzantine.presets import PRESETS
from raysys.systems.byzantine.setting import Setting
from raysys.systems.byzantine.simulate import simulation
from raysys.systems.byzantine.task import Task


class TrainConfig(ClusterJob, Setting):
    """Train one rule under one attack over Ray actors, beside its baselines."""

    presets: ClassVar = PRESETS

    block: int = Field(4, ge=1)
    """Workers stepped together in one batched pass. A block never spans two hosts, so the layout cannot change a number."""
    execution: Literal["actors", "inprocess"] = "actors"
    """actors: clients, adversaries and server are Ray actors; inprocess: the same numbers in this process."""
    shards: int = Field(1, ge=1, le=1024)
    """Column shards of the server (actors only): the aggregation of one round is cut over so many actors."""
    baselines: bool = True
    """Also run the plain mean (or gossip) with and without the attack, and the rule without local momentum."""
    log_every: int = Field(10, ge=1)
    """Rounds between measurements."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.shards > 1 and (self.normalised or self.execution != "actors" or self.topology != "server"):
            raise ValueError(
                f"shards: got {self.shards}; several shards need execution actors, topology server and no normalised"
            )
        if self.shards > 1 and not make_rule(self.rule, self.workers, self.byzantine).plannable:
            raise ValueError(f"shards: got {self.shards}; the rule {self.rule} sees whole vectors and cannot be cut")
        return self

    @property
    def distributed(self) -> bool:
        return self.execution == "actors"

    def check(self) -> None:
        check_data(self)

    def arms(self) -> dict[str, tuple[str, Setting]]:
        """What is compared: role -> (name, setting)."""
        values = {name: getattr(self, name) for name in Setting.model_fields}
        rule, plain = ("rule", "mean") if self.topology == "server" else ("peer_rule", "gossip")
        arms = {"robust": (values[rule], values)}
        if self.baselines:
            if self.momentum_at == "worker" and self.momentum > 0:
                arms["no_momentum"] = (
                    f"{values[rule]}, no momentum",
                    values | {"momentum_at": "none", "remember": False},
                )
            arms["plain"] = (plain, values | {rule: plain, "assumed": None})
            arms["free"] = (f"{plain}, no attack", values | {rule: plain, "attack": "none", "assumed": None})
        return {role: (name, Setting.of(v)) for role, (name, v) in arms.items()}


def train(config: TrainConfig, run: Run, session: Session) -> None:
    """Every arm on every seed, one after the other; then the comparison."""
    arms = config.arms()
    units = [
        (role, name, setting, seed)
        for role, (name, setting) in arms.items()
        for seed in range(config.seed, config.seed + config.seeds)
    ]
    results: dict[str, list[dict[str, Any]]] = {name: [] for name, _ in arms.values()}
    done = sum(run.stage(f"{name}/seed{seed}").result is not None for _, name, _, seed in units)
    with Progress(len(units) * config.rounds, "train", done=done * config.rounds) as progress:
        for _, name, setting, seed in units:
            stage = run.stage(f"{name}/seed{seed}")
            if stage.result is None:
                progress.note(f"{name}, seed {seed}")
                train_once(config, setting, seed, stage, session, progress)
            results[name].append(stage.result or {})
    lines = []
    for name, each in results.items():
        line: dict[str, Any] = {"arm": name}
        for metric, label, unit, digits in REPORTED:
            values = [r[metric] for r in each if r.get(metric) is not None]
            if values:
                interval = mean_ci(values)
                run.row(metric, interval, arm=name)
                line[label] = f"{unit * interval.mean:.{digits}f}"
        lines.append(line)
    where = "Ray actors" if config.execution == "actors" else "this process"
    run.grid(
        f"Training under {config.attack} over {where}, {config.rounds} rounds, mean of {config.seeds} seeds", lines
    )
    run.figure("curves", figures.training_curves({name: [r["curve"] for r in each] for name, each in results.items()}))
    if config.problem != "quadratic":
        task = Task(arms["robust"][1], config.seed)
        counts = task.partition.counts(task.dataset.train.y, task.dataset.classes)
        run.figure("partition", figures.partition_figure(counts, config.partition))
    if config.baselines and config.seeds > 1:
        for claim in claims.training_claims(results, {role: name for role, (name, _) in arms.items()}):
            run.claim(**claim)


def train_once(
    config: TrainConfig, setting: Setting, seed: int, stage: Stage, session: Session, progress: Progress
) -> None:
    """One training run from its last barrier to its end."""
    device = "cuda" if config.cluster.gpus_per_host else "cpu"
    task = Task(setting, seed, device)
    loop = partial(
        Rounds,
        stage,
        setting.rounds,
        snapshot_every=config.cluster.snapshot_every,
        log_every=config.log_every,
        timeout_s=config.cluster.timeout_s,
        progress=progress,
    )
    if config.execution == "inprocess":
        model, counts = in_process(task, loop)
    elif setting.topology == "server":
        model, counts = with_server(task, loop, session, config.shards)
    else:
        model, counts = peer_to_peer(task, loop, session)
    stage.run.count(messages=counts["messages"], bytes=counts["bytes"])
    write_state(
        stage.run.storage,
        f"{stage.folder}/model.safetensors",
        {"model": model},
        {"setting": setting.model_dump(), "seed": seed},
    )
    curve = stage.run.metrics.rows(stage.name)
    result = {**{k: v for k, v in curve[-1].items() if k not in ("stage", "round", "t")}, **counts, "curve": curve}
    if "gradient_sq" in curve[-1]:
        result["tail"] = claims.tail_gradient(curve)
        if setting.sample is None:
            result["worst_case"] = claims.floor_at_fit(task.rule, setting.honest, curve, setting.alpha)
    stage.finish(result)


Loop = Callable[[list[Participant]], Rounds]
Outcome = tuple[np.ndarray, dict[str, int]]


def with_server(task: Task, loop: Loop, session: Session, shards: int) -> Outcome:
    """Byz-SGD(M): clients and adversaries send, the server aggregates robustly, everyone receives."""
    setting, n = task.setting, task.setting.workers
    clients = NodeGroup.spawn(session, Client, task.workers, blocks(task.honest, setting.block), n, name="clients")
    adversaries = NodeGroup.spawn(
        session, Adversary, task.at_server.adversaries, [task.byzantine], n, name="adversaries", hosts=1
    )
    server = ServerGroup.spawn(
        session,
        task.at_server.server,
        task.at_server.problem.dimension,
        n,
        partial(evaluate_server, task.at_server),
        shards=shards,
        align=BLOCK,
    )
    rounds = loop([clients, adversaries, server])
    for t in rounds:
        updates = clients.train(t, server.cuts)
        updates += adversaries.corrupt(t, updates, server.cuts)
        model = server.aggregate(t, updates)
        clients.receive(t, model)
        adversaries.receive(t, model)
        if rounds.due(t):
            rounds.log(t, server.evaluate(model, clients.statistics(t)))
    final = rounds.after(lambda: np.concatenate(server.each("model")))
    counts = rounds.after(lambda: add(server.counters(), clients.counters()) | server.each("outcomes")[0])
    for group in (clients, adversaries, server):
        group.stop()
    return final, counts


def peer_to_peer(task: Task, loop: Loop, session: Session) -> Outcome:
    """The same without a server: peers step, exchange models with their neighbours and mix them robustly."""
    setting, n = task.setting, task.setting.workers
    peers = NodeGroup.spawn(
        session,
        Peer,
        task.peers,
        blocks(task.honest, setting.block),
        n,
        partial(evaluate_peers, task.at_server),
        name="peers",
    )
    adversaries = NodeGroup.spawn(
        session, PeerAdversary, task.at_server.peer_adversaries, [task.byzantine], n, name="adversaries", hosts=1
    )
    rounds = loop([peers, adversaries])
    for t in rounds:
        models = peers.train(t)
        (told,) = adversaries.corrupt(t, models)
        peers.exchange(t, models, told)
        if rounds.due(t):
            rounds.log(t, peers.evaluate(peers.statistics(t)))
    each = rounds.after(lambda: np.concatenate([state["model"] for _, state in peers.snapshot()]))
    counts = rounds.after(lambda: peers.counters() | add(*peers.each("outcomes")))
    for group in (peers, adversaries):
        group.stop()
    return each.astype(np.float64).mean(0).astype(np.float32), counts


def in_process(task: Task, loop: Loop) -> Outcome:
    """The same objects in this process, without Ray."""
    simulated = simulation(task)
    rounds = loop([Local(name, part) for name, part in simulated.parts().items()])
    for t in rounds:
        simulated.step(t)
        if rounds.due(t):
            rounds.log(t, simulated.evaluate(t))
    return simulated.model, {"messages": 0, "bytes": 0} | simulated.outcomes()


REPORTED = [
    ("accuracy", "accuracy (%)", 100, 1),
    ("worst_accuracy", "worst peer (%)", 100, 1),
    ("excess_loss", "L - L*", 1, 4),
    ("tail", "|grad L|^2, last quarter", 1, 4),
    ("worst_case", "guaranteed, steps to 0", 1, 4),
]
"""Measurement, its column, the factor it is shown with, digits."""
TOUR = ["mean", "trimmed_mean", "geometric_median", "krum", "nnm+trimmed_mean", "caf"]


class DemoConfig(TrainConfig):
    """The tour: train over Ray actors under the worst attack, then every rule against every attack on two divisions."""

    rounds: int = Field(80, ge=1)
    """Training rounds T, of the actors and of every cell."""


def demo(config: DemoConfig, run: Run, session: Session) -> None:
    """Both halves in one run folder and one report."""
    train(config, run, session)
    shared = {name: getattr(config, name) for name in config.model_fields_set & set(MatrixConfig.model_fields)}
    matrix(MatrixConfig.of({**shared, "rounds": config.rounds, "rules": TOUR}), run, session)


def main() -> None:
    """Entry point of python -m jobs.byzantine and of raysys byzantine."""
    commands = {"train": (TrainConfig, train), "demo": (DemoConfig, demo), "matrix": (MatrixConfig, matrix), **STUDIES}
    start("byzantine", commands, "train", __doc__ or "")


if __name__ == "__main__":
    main()
