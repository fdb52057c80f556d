"""From a setting and a seed to the objects of one run. Everything here is a function of the two.

Notable choices
- A task is a recipe, cheap to send: hosts load the model and the texts themselves, once per process, whatever the number of runs.
- All methods of a seed share the partition, the start of A, the batches, the graphs and the test texts: common random numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from raysys.data import make_partition
from raysys.data.texts import TextDataset, Texts, load_texts
from raysys.graph import (
    Matrix,
    Probe,
    Process,
    RunningContraction,
    contraction_closed_form,
    contraction_monte_carlo,
    make_process,
)
from raysys.nn.body import TextBody, random_head
from raysys.nn.lora import Layout, find_layout
from raysys.nn.pretrained import load_base
from raysys.nn.textstore import TextStore
from raysys.runtime.seeds import Seeds, Stream
from raysys.systems.tad_lora import regression
from raysys.systems.tad_lora.interval import select_interval
from raysys.systems.tad_lora.learners import GroupedLearner, Learner, PeftLearner
from raysys.systems.tad_lora.peers import PROBING, Peers, present
from raysys.systems.tad_lora.setting import Setting

I64 = NDArray[np.int64]
DRAWS = 4000
"""Mixing matrices drawn for a Monte Carlo estimate of rho."""
VALIDATION = 10
"""One in so many training texts is held out for tuning."""


@dataclass(frozen=True)
class Task:
    """One run: what `setting` describes, with the random numbers of `seed`."""

    setting: Setting
    seed: int
    device: str = "cpu"

    def __getstate__(self) -> tuple[Setting, int, str]:
        return self.setting, self.seed, self.device

    def __setstate__(self, state: tuple[Setting, int, str]) -> None:
        for name, value in zip(("setting", "seed", "device"), state, strict=True):
            object.__setattr__(self, name, value)

    @property
    def seeds(self) -> Seeds:
        return Seeds(self.seed)

    @property
    def nodes(self) -> I64:
        return np.arange(self.setting.peers)

    @cached_property
    def process(self) -> Process | None:
        """The graph process; None for a node on its own."""
        s = self.setting
        if s.peers == 1:
            return None
        return make_process(s.topology, s.peers, s.weights, self.seeds.rng(Stream.GRAPH))

    @cached_property
    def rho(self) -> float:
        """Contraction rate of the declared process: closed form, or Monte Carlo with its own random numbers."""
        if self.process is None:
            return 0.0
        rng = self.seeds.rng(Stream.GRAPH, 1)
        if not self.setting.absence:
            return contraction_of(self.process, rng)
        running = RunningContraction(self.setting.peers)  # absent peers make the graph sparser than declared
        for t in range(DRAWS // 4):
            running.add(self.process.mixing(t, rng, present(self.setting, self.seeds, t)))
        return running.value

    def mixing(self, t: int, sent: NDArray[np.bool_]) -> Matrix:
        """W (n, n) of a round of training (t < 0: of the probe before it), given who sent something usable. Blocks of a
        process ask for the same one."""
        key = t, sent.tobytes()
        if self.__dict__.get("_mixed", (None,))[0] != key:
            assert self.process is not None
            rng = self.seeds.rng(Stream.GRAPH, 0, t) if t >= 0 else self.seeds.rng(Stream.GRAPH, 2, t + PROBING)
            self.__dict__["_mixed"] = (
                key,
                self.process.mixing(t if t >= 0 else t + self.setting.probe_rounds, rng, sent),
            )
        return self.__dict__["_mixed"][1]

    @property
    def interval(self) -> int:
        """T where it is known before the first round; 0 where a probe is to find it."""
        s = self.setting
        if s.method not in ("tad", "adf"):
            return 0
        if s.interval:
            return s.interval
        return 0 if self.probes else select_interval(self.rho, s.kappa, s.rounds)

    @property
    def probes(self) -> bool:
        """Whether peers find T by messages of their own."""
        s = self.setting
        return s.interval_from == "probe" and s.method == "tad" and not s.interval and self.process is not None

    def probe(self, nodes: I64) -> Probe | None:
        """A block's part in the probe."""
        s = self.setting
        if not self.probes:
            return None
        return Probe(nodes, self.seeds, s.probe_rounds)

    @property
    def rounds(self) -> int:
        """Rounds in all, those of a probe included."""
        return self.setting.rounds + self.delay

    @property
    def delay(self) -> int:
        """Rounds of a probe before the first of training."""
        return self.setting.probe_rounds if self.probes else 0

    @cached_property
    def texts(self) -> tuple[Texts, Texts]:
        """Training texts and those that models are measured on, after the setting's choice of both."""
        s, dataset = self.setting, texts_of(self.setting.data)
        order = np.random.default_rng(0).permutation(
            len(dataset.train.y)
        )  # one choice for all seeds: same items, paired
        held = len(order) // VALIDATION
        chosen = order[held:] if s.validate_on == "validation" else order
        chosen = np.sort(chosen[: s.examples] if s.examples else chosen)
        if s.validate_on == "validation":
            return chosen_of(dataset.train, chosen), chosen_of(dataset.train, np.sort(order[:held])[: s.test])
        tested = np.random.default_rng(1).permutation(len(dataset.test.y))[: s.test]
        return chosen_of(dataset.train, chosen), chosen_of(dataset.test, np.sort(tested))

    @cached_property
    def division(self) -> tuple[I64, ...]:
        """Rows of each peer's own training texts."""
        train = self.texts[0]
        rng = self.seeds.rng(Stream.PARTITION)
        return make_partition(self.setting.partition, train.y, self.setting.peers, rng, train.group).indices

    @cached_property
    def layout(self) -> Layout:
        s = self.setting
        return regression.LAYOUT if s.problem == "regression" else layout_of(s, self.device)

    def start(self, round: int) -> tuple[Tensor, Tensor]:
        """Flat factors that all peers start from before the first round (-1), or anew after a round."""
        if self.setting.problem == "regression" and round < 0:
            return regression.start(self.seeds)
        return self.layout.init(self.seeds.generator(Stream.INIT, 0, round))

    @cached_property
    def learner(self) -> Learner:
        s = self.setting
        if s.problem == "regression":
            return regression.RegressionLearner(s, self.seeds)
        body, store, held = body_of(key_of(s, self.device))
        train, test = self.texts
        if s.backend == "peft":
            return PeftLearner(body, self.head, train, test, self.division, s, self.seeds)
        return GroupedLearner(body, store, held, self.head, train, test, self.division, s, self.seeds)

    @cached_property
    def head(self) -> Tensor:
        """(C, d) the frozen head that all peers share."""
        classes = len(texts_of(self.setting.data).labels)
        return random_head(
            classes, load_base(self.setting.model, self.device).width, self.seeds.generator(Stream.INIT, 1)
        )

    def peers(self, nodes: I64) -> Peers:
        """A block of peers."""
        return Peers(
            self.learner,
            self.start,
            self.setting,
            self.seeds,
            nodes,
            self.process,
            self.mixing,
            self.interval,
            self.probe(nodes),
        )


@lru_cache(maxsize=2)
def texts_of(source: str) -> TextDataset:
    """The texts of a source, read once per process."""
    return load_texts(source)


def chosen_of(texts: Texts, rows: I64) -> Texts:
    """Some of the texts."""
    second = None if texts.second is None else tuple(texts.second[i] for i in rows)
    group = None if texts.group is None else texts.group[rows]
    return Texts(tuple(texts.first[i] for i in rows), second, texts.y[rows], group)


def layout_of(s: Setting, device: str = "cpu") -> Layout:
    """The adapted layers of the setting's model."""
    return find_layout(load_base(s.model, device).model, s.targets, s.layers, s.rank, s.alpha)


Key = tuple[str, str]


def key_of(s: Setting, device: str) -> Key:
    """What the states below the adapted layers depend on: the setting without what only training reads, and the device."""
    kept = (
        "data",
        "examples",
        "test",
        "validate_on",
        "max_length",
        "model",
        "targets",
        "layers",
        "rank",
        "alpha",
        "precision",
    )
    return Setting.of({name: getattr(s, name) for name in kept}).model_dump_json(), device


@lru_cache(maxsize=2)
def body_of(key: Key) -> tuple[TextBody, TextStore, TextStore]:
    """The model with adapters, and the training and test texts below them: once per process, for all methods and seeds."""
    s, device = Setting.model_validate_json(key[0]), key[1]
    base = load_base(s.model, device)
    body = TextBody(base, layout_of(s, device), s.max_length, s.precision == "bfloat16")
    train, test = Task(s, 0).texts
    return body, TextStore(body, train.first, train.second), TextStore(body, test.first, test.second)


def contraction_of(process: Process, rng: np.random.Generator) -> float:
    """rho of a process: in closed form where there is one, else by Monte Carlo."""
    exact = contraction_closed_form(process)
    return contraction_monte_carlo(process, DRAWS, rng) if exact is None else exact


def check_task(task: Task) -> None:
    """Look at what a run needs (texts, model, division) before anything is started or written.

    Raises:
        ValueError: one sentence for the user.
    """
    if task.setting.problem == "text":
        texts_of(task.setting.data)
        try:
            base, layout = load_base(task.setting.model), layout_of(task.setting)
        except ImportError as error:
            raise ValueError(f"model: text needs the extra raysys[text] ({error})") from error
        TextBody(base, layout, task.setting.max_length).check()
        if not len(task.texts[1].y):
            raise ValueError(f"data: got {task.setting.data!r}; it has no texts to test on")
        assert task.division
