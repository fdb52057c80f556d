"""From a setting and a seed to the objects of one training run. Everything here is a function of the two.

Notable choices
- A task is a recipe, cheap to send: hosts receive it and build their own problem, so data never travels through the controller.
- Honest workers have the ids 0..h-1, Byzantine ones h..n-1; both own a part of the data.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from raysys.aggregation import Rule, make_rule
from raysys.aggregation.neighbours import make_peer_rule
from raysys.attacks import Attack, make_attack
from raysys.data import Dataset, Partition, load_dataset, make_partition
from raysys.graph import Graph, make_graph
from raysys.nn.batched import cnn, mlp, softmax_regression
from raysys.runtime.seeds import Seeds, Stream
from raysys.systems.byzantine.aggregator import Aggregator
from raysys.systems.byzantine.dissimilarity import planted_quadratics
from raysys.systems.byzantine.peers import PeerAdversaries, Peers
from raysys.systems.byzantine.problems import Classification, Problem, Quadratics
from raysys.systems.byzantine.setting import Setting
from raysys.systems.byzantine.theory import rpel_b_hat, subsampled_f
from raysys.systems.byzantine.workers import Adversaries, Workers

I64 = NDArray[np.int64]


@dataclass(frozen=True)
class Task:
    """One training run: what `setting` describes, with the random numbers of `seed`."""

    setting: Setting
    seed: int
    device: str = "cpu"

    @property
    def seeds(self) -> Seeds:
        return Seeds(self.seed)

    @property
    def honest(self) -> I64:
        return np.arange(self.setting.honest)

    @property
    def byzantine(self) -> I64:
        return np.arange(self.setting.honest, self.setting.workers)

    def __getstate__(self) -> tuple[Setting, int, str]:
        return self.setting, self.seed, self.device

    def __setstate__(self, state: tuple[Setting, int, str]) -> None:
        for name, value in zip(("setting", "seed", "device"), state, strict=True):
            object.__setattr__(self, name, value)

    @cached_property
    def dataset(self) -> Dataset:
        return dataset(self.setting.data)

    @cached_property
    def partition(self) -> Partition:
        train = self.dataset.train
        rng = self.seeds.rng(Stream.PARTITION)
        return make_partition(self.setting.partition, train.y, self.setting.workers, rng, train.group)

    @cached_property
    def problem(self) -> Problem:
        s = self.setting
        if s.problem == "quadratic":
            rng = self.seeds.rng(Stream.PARTITION)
            planted = planted_quadratics(s.honest, s.hidden, s.dissimilarity_g, s.dissimilarity_b, rng)
            return Quadratics(planted, s.sigma, self.seeds)
        features, classes = self.dataset.features, self.dataset.classes
        if s.problem == "mlp":
            model = mlp(features, classes, s.hidden)
        elif s.problem == "cnn":
            model = cnn(features, classes, s.hidden)
        else:
            model = softmax_regression(features, classes)
        flipped = frozenset(self.byzantine.tolist()) if self.attack.data_level else frozenset()
        return Classification(
            model,
            self.dataset,
            self.partition,
            s.batch,
            s.l2,
            self.seeds,
            s.problem == "least_squares",
            flipped,
            self.device,
        )

    @property
    def attack(self) -> Attack:
        """A new attack: it learns as the run goes on, so every adversary gets its own."""
        return make_attack(self.setting.attack, self.setting.workers, self.setting.byzantine)

    @cached_property
    def rule(self) -> Rule:
        """The server's rule, told f as the setting says; with sampling, f of the sample by the hypergeometric tail."""
        s = self.setting
        f = s.byzantine if s.assumed is None else s.assumed
        if s.remember or s.sample is None or s.sample == s.workers:  # who remembers aggregates everyone
            return make_rule(s.rule, s.workers, f)
        chosen = subsampled_f(s.workers, f, s.sample, s.rounds, s.sample_failure)
        return make_rule(s.rule, s.sample, chosen)

    def graph(self, round: int) -> Graph:
        """The peers' graph in a round: one for all, or drawn anew from (seed, round), so that nobody has to be told."""
        return graph_of(self.setting.topology, self.setting.workers, self.seed, round if self.setting.redraw else -1)

    def workers(self, nodes: I64) -> Workers:
        return Workers(self.problem, self.setting, self.seeds, nodes)

    @property
    def at_server(self) -> Task:
        """The same run for the processes that reserve no GPU: server, adversaries, evaluation."""
        return replace(self, device="cpu")

    def adversaries(self, nodes: I64) -> Adversaries:
        return Adversaries(self.problem, self.setting, self.seeds, nodes, self.attack, self.rule)

    def server(self, columns: slice | None = None) -> Aggregator:
        return Aggregator(self.problem.init().numpy(), self.setting, self.rule, self.seeds, columns)

    def peers(self, nodes: I64) -> Peers:
        rule, s = make_peer_rule(self.setting.peer_rule), self.setting
        b = s.assumed
        if rule.pulls is not None:
            b = rpel_b_hat(s.workers, s.byzantine if b is None else b, rule.pulls, s.rounds, s.sample_failure)
        return Peers(self.problem, s, self.seeds, nodes, self.graph, rule, b)

    def peer_adversaries(self, nodes: I64) -> PeerAdversaries:
        rule = make_peer_rule(self.setting.peer_rule)
        return PeerAdversaries(self.problem, self.setting, self.seeds, nodes, self.graph, self.attack, rule)


@lru_cache(maxsize=4)
def graph_of(topology: str, n: int, seed: int, round: int) -> Graph:
    """The graph drawn for (seed, round): every block of a host asks for the same one."""
    return make_graph(topology, n, Seeds(seed).rng(Stream.GRAPH, 0, round))


@lru_cache(maxsize=2)
def dataset(source: str) -> Dataset:
    """The data of `source`, read once per process: a worker that runs many cells of a matrix reads it for the first."""
    return load_dataset(source)
