"""What is trained, by how many peers, over which graphs, by which method: the part of the configuration that decides numbers."""

from __future__ import annotations

from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from raysys.data.partition import parse_partition
from raysys.graph import MIXING, make_process
from raysys.nn.pretrained import MINILM
from raysys.runtime.config import Config
from raysys.systems.tad_lora.policies import make_policy


class Setting(Config):
    """Decentralised LoRA: n peers, one method, one graph process."""

    problem: Literal["text", "regression"] = "text"
    """text: classify texts with adapters in a frozen language model; regression: the low-rank matrix problem whose optimum is
    known exactly."""
    data: str = "grammar"
    """grammar (made by a stated grammar, nothing to download), or a file or folder of CLINC150, BANKING77, TREC, SST-2, SICK,
    SNLI or a CSV/TSV/JSONL table, or glue/NAME from the Hugging Face hub."""
    examples: int = Field(0, ge=0)
    """Training texts used in all (a seeded choice); 0 means all."""
    test: int = Field(400, ge=1)
    """Held-out texts that every peer's model is tested on (a seeded choice)."""
    validate_on: Literal["test", "validation"] = "test"
    """validation: a tenth of the training texts is held out and measured instead of the test set; what is tuned uses this."""
    max_length: int = Field(32, ge=4, le=8192)
    """Tokens kept of a text."""

    model: str = MINILM
    """Frozen body: minilm (ships with a package), or any Hugging Face encoder or causal language model by path or id."""
    targets: list[str] = Field([])
    """Name endings of the linear layers that get adapters, such as query value; peft's choice for the model unless given."""
    layers: int = Field(2, ge=0, le=1000)
    """Top transformer layers that get adapters; 0 means all. What lies below is computed once per text."""
    rank: int = Field(8, ge=1, le=1024)
    """Rank r of the adapters."""
    alpha: float = Field(16.0, gt=0)
    """Scale: W0 + (alpha / r) B A."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the frozen layers' products; factors and their mixing are always float32."""
    backend: Literal["grouped", "peft"] = "grouped"
    """grouped: all peers of a block in one batch; peft: one peft model per peer, one after the other. Same numbers."""

    method: str = "tad"
    """local, centralised, lora (FedIT, Dec-LoRA), ffa, rolora, adf, tad, fedsa, flora, fedex, decaf (FlexLoRA), procrustes."""
    interval: int = Field(0, ge=0)
    """Rounds T for which adf and tad train one factor before the other; 0 lets tad choose T by the graph process."""
    kappa: float = Field(2.0, gt=0)
    """T = kappa / sqrt(1 - rho), snapped to a divisor of the rounds."""
    interval_from: Literal["process", "probe"] = "process"
    """Where tad takes rho from: the declared graph process (closed form or Monte Carlo), or messages among the peers before
    the first round, of which no peer needs to know the process."""
    probe_rounds: int = Field(200, ge=20)
    """Rounds of messages among the peers that a probe takes before training."""
    peers: int = Field(10, ge=1, le=5_000)
    """Peers n."""
    partition: str = "dirichlet(1.0)"
    """How training texts are divided: iid, dirichlet(ALPHA), skew (the paper's label skew), shards(PER_NODE), natural."""
    topology: str = "erdos_renyi(p=0.1)"
    """Graph process: erdos_renyi(p=P) drawn anew each round, ring, complete, matching, one_peer_exponential, finite_time(k=K),
    random_regular(degree=K), waypoint(radius=R, speed=S), with +dropout(p=P) for lost links."""
    weights: str = "metropolis_hastings"
    """Mixing weights on the graph of a round: metropolis_hastings, laplacian (Dec-LoRA), lazy, max_degree or pairwise."""
    absence: float = Field(0.0, ge=0, lt=1)
    """Chance that a peer misses a round: it neither trains nor talks, and the others mix without it."""

    rounds: int = Field(30, ge=1)
    """Communication rounds R."""
    steps: int = Field(10, ge=1)
    """Local steps K per round."""
    batch: int = Field(4, ge=1)
    """Texts per peer and step."""
    lr: float = Field(2e-3, gt=0)
    """Step size."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Step size over the rounds."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Local optimizer, without weight decay or momentum of its own making."""
    optimizer_state: Literal["reset", "kept"] = "reset"
    """Whether Adam's moments of a factor start anew each round, or are kept until that factor is trained again."""
    evaluate_every: int = Field(10, ge=1)
    """Rounds between tests of the peers' models; what needs no test (cross term, disagreement) is measured every round."""

    heterogeneity: float = Field(0.5, ge=0)
    """Regression only: size of the peers' differences from the common target."""
    noise: float = Field(0.5, ge=0)
    """Regression only: standard deviation of the noise on every entry of a gradient."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        parse_partition(self.partition)
        policy = make_policy(self.method, max(self.interval, 1))
        if self.method == "adf" and not self.interval:
            raise ValueError("interval: got 0; adf alternates at a given interval of at least 1, tad chooses its own")
        if self.method == "centralised" and (self.peers != 1 or self.problem != "text"):
            raise ValueError(f"peers: got {self.peers}; the method centralised is one node with all texts")
        if self.weights not in MIXING:
            raise ValueError(f"weights: got {self.weights!r}; allowed are {', '.join(MIXING)}")
        if self.peers > 1:
            process = make_process(self.topology, self.peers, self.weights, np.random.default_rng(0))
            # Push-sum keeps one mass for all that a peer mixes, so both factors must travel together or one of them never.
            if process.directed and (policy.how != "factors" or self.method == "rolora"):
                raise ValueError(f"topology: got {self.topology!r}; the method {self.method} needs undirected graphs")
            if process.directed and self.interval_from == "probe":
                raise ValueError(
                    "interval_from: got probe; it measures undirected graphs, and this topology is directed"
                )
        if policy.changes_base and (self.topology != "complete" or self.absence):
            raise ValueError(
                f"topology: got {self.topology!r}; {self.method} changes the frozen weights, which stay common to all only"
                " with topology complete and absence 0"
            )
        if policy.changes_base and self.weights not in ("metropolis_hastings", "max_degree"):
            raise ValueError(
                f"weights: got {self.weights!r}; {self.method} needs the plain mean: metropolis_hastings or max_degree"
            )
        if self.backend == "peft" and (policy.changes_base or self.precision != "float32"):
            raise ValueError(
                f"backend: got peft; it runs in float32 and cannot change the frozen weights (method {self.method},"
                f" precision {self.precision})"
            )
        if self.optimizer_state == "kept" and (self.problem == "regression" or self.absence):
            raise ValueError("optimizer_state: got kept; it needs the problem text and absence 0")
        if self.problem == "regression" and self.backend == "peft":
            raise ValueError("backend: got peft; the regression problem has no language model")
        return self

    def with_method(self, method: str, **changes: object) -> Setting:
        """The same setting for another method, at the same number of local steps. Centralised: one peer, n-fold batch."""
        values = self.model_dump() | {"method": method} | changes
        if method == "centralised":
            values |= {"peers": 1, "batch": self.batch * self.peers, "partition": "iid", "absence": 0.0}
        return type(self).of(values)

    def step_size(self, round: int) -> float:
        """Step size of a round."""
        if self.schedule == "constant":
            return self.lr
        return self.lr * 0.5 * (1 + float(np.cos(np.pi * round / self.rounds)))
