"""What is trained, by whom, against whom: the part of a run's configuration that decides its numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from raysys.aggregation import make_rule
from raysys.aggregation.neighbours import make_peer_rule
from raysys.attacks import make_attack
from raysys.attacks.peers import PeerAttack
from raysys.data.partition import parse_partition
from raysys.graph import make_graph
from raysys.runtime.config import Config
from raysys.systems.byzantine.theory import rpel_b_hat


class Training(Config):
    """Who trains what, and how: all but the rule, the attack and the partition."""

    data: str = "digits"
    """digits, breast_cancer (both ship with scikit-learn), a folder of MNIST / Fashion-MNIST / CIFAR-10 binary files, a CSV
    table with a `label` column, or hf:owner/name."""
    problem: Literal["softmax", "mlp", "cnn", "least_squares", "quadratic"] = "softmax"
    """softmax regression and least squares satisfy PL; mlp and cnn are nonconvex; quadratic plants (G, B) and needs no data."""
    hidden: int = Field(32, ge=1, le=4096)
    """Hidden units of the mlp, channels of the cnn's first layer, dimension of the quadratic."""
    l2: float = Field(1e-3, ge=0)
    """Weight of the l2 term in every local loss."""
    dissimilarity_g: float = Field(1.0, ge=0)
    """Quadratic only: G of the (G, B)-dissimilarity."""
    dissimilarity_b: float = Field(0.0, ge=0)
    """Quadratic only: B of the (G, B)-dissimilarity."""
    sigma: float = Field(0.0, ge=0)
    """Quadratic only: standard deviation of the gradient noise, E|xi|^2 = sigma^2."""

    workers: int = Field(20, ge=1, le=1_000_000)
    """Workers n, Byzantine ones included."""
    byzantine: int = Field(4, ge=0)
    """Byzantine workers f."""
    assumed: int | None = Field(None, ge=0)
    """What the rule is told f is; the truth unless given. With client sampling it is chosen by the hypergeometric tail."""

    rounds: int = Field(200, ge=1)
    """Training rounds T."""
    batch: int = Field(16, ge=1)
    """Examples per worker and step."""
    lr: float = Field(0.5, gt=0)
    """Step size of the server (of the peers, without a server)."""
    lr_decay: float = Field(0.3, gt=0, le=1)
    """The step size is multiplied by this at half time."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """beta = 1 - alpha of the momentum m <- beta m + (1 - beta) g."""
    momentum_at: Literal["worker", "server", "none"] = "worker"
    """Local momentum (Byz-SGDM), momentum of the aggregate at the server (not protective), or plain Byz-SGD."""
    normalised: bool = False
    """Divide the aggregate by its norm (Byz-NSGDM)."""
    local_steps: int = Field(1, ge=1, le=10_000)
    """Local SGD steps per round; above 1 the workers send their model change divided by local_steps * local_lr, so
    lr = local_steps * local_lr makes the server's step that of FedAvg."""
    local_lr: float = Field(0.1, gt=0)
    """Step size of local steps."""
    sample: int | None = Field(None, ge=1)
    """Workers sampled per round; all unless given."""
    sample_failure: float = Field(0.05, gt=0, lt=1)
    """With sampling: the chance, over the whole run, that some round has more Byzantine workers than the rule assumes."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Chance that an honest worker misses a round. Byzantine workers never do: the worst case."""
    remember: bool = False
    """Aggregate the last message of absent workers too (DeMoA); without it the rule sees only what arrived."""

    topology: str = "server"
    """server, or a graph of peers: complete, ring, torus, star, erdos_renyi(p), exponential, random_regular(k), small_world(...),
    two_cliques(matchings=...)."""
    redraw: bool = False
    """Draw the peers' graph anew every round (random graphs such as erdos_renyi): a time-varying topology."""
    peer_rule: str = "clip_2b"
    """How a peer mixes its neighbours' models: clip_2b, clipped_gossip, nna, monna, bridge, ios, rpel(pulls=15) or gossip."""

    block: int = Field(16, ge=1)
    """Workers stepped together in one batched pass. A block never spans two hosts, so the layout cannot change a number."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        n, f = self.workers, self.byzantine
        if 2 * f >= n:
            raise ValueError(
                f"byzantine: got {f}; no rule survives unless workers > 2 * byzantine, here workers is {n}"
            )
        if self.assumed is not None and 2 * self.assumed >= n:
            raise ValueError(f"assumed: got {self.assumed}; allowed is less than half of the {n} workers")
        if self.sample is not None and self.sample > n:
            raise ValueError(f"sample: got {self.sample}; allowed is at most the {n} workers")
        if self.remember and self.momentum_at != "worker":
            raise ValueError("remember: got true; messages are worth remembering only with momentum_at worker")
        if self.topology != "server" and (self.sample or self.remember or self.normalised or self.local_steps > 1):
            raise ValueError(
                f"topology: got {self.topology}; sample, remember, normalised and local_steps need a server"
            )
        if self.topology != "server" and self.momentum_at == "server":
            raise ValueError(
                f"momentum_at: got server; with the topology {self.topology} there is none, allowed are worker and none"
            )
        if self.redraw and self.topology == "server":
            raise ValueError("redraw: got true; only a graph of peers can be drawn anew, and topology is server")
        return self

    @property
    def honest(self) -> int:
        """Honest workers h = n - f; they have the ids 0..h-1."""
        return self.workers - self.byzantine

    @property
    def alpha(self) -> float:
        """Weight of the newest gradient in the local momentum."""
        return 1 - self.momentum if self.momentum_at == "worker" else 1.0

    def step_size(self, round: int) -> float:
        """Step size of a round."""
        return self.lr * (self.lr_decay if 2 * round >= self.rounds else 1.0)


class Setting(Training):
    """Byzantine-robust SGD: n workers, f of them Byzantine, one rule, one attack."""

    partition: str = "dirichlet(10)"
    """How examples are divided: iid, dirichlet(ALPHA), shards(PER_NODE), gamma(SIMILARITY) or natural."""
    rule: str = "nnm+trimmed_mean"
    """Aggregation: pre-aggregators and a rule joined by +, for example arc+nnm+geometric_median, or module:function."""
    attack: str = "best_response"
    """What Byzantine workers send: none, sign_flip, ipm, alie, best_response, mimic, label_flip ..., or module:function."""

    @model_validator(mode="after")
    def _exist(self) -> Self:
        named("partition", self.partition, parse_partition, self.partition)
        named("attack", self.attack, make_attack, self.attack, self.workers, self.byzantine)
        if self.topology == "server" and isinstance(make_attack(self.attack, self.workers, self.byzantine), PeerAttack):
            raise ValueError(f"attack: got {self.attack!r}; it needs peers, and topology is server")
        if self.topology == "server":
            f = self.byzantine if self.assumed is None else self.assumed
            named("rule", self.rule, make_rule, self.rule, self.workers, f)
            if make_rule(self.rule, self.workers, f).trusts_first:
                raise ValueError(
                    f"rule: got {self.rule!r}; it trusts one row, a peer's own, and a server has none to trust"
                )
        else:
            named("peer_rule", self.peer_rule, make_peer_rule, self.peer_rule)
            pulls = make_peer_rule(self.peer_rule).pulls
            if pulls is not None:
                if self.topology != "complete" or pulls >= self.workers:
                    raise ValueError(
                        f"peer_rule: got {self.peer_rule!r}; it needs topology complete and pulls below {self.workers}"
                    )
                f = self.byzantine if self.assumed is None else self.assumed
                b = rpel_b_hat(self.workers, f, pulls, self.rounds, self.sample_failure)
                named("peer_rule", self.peer_rule, make_peer_rule(self.peer_rule).requires, pulls, b)
            named("topology", self.topology, make_graph, self.topology, self.workers, np.random.default_rng(0))
        return self


def named(field: str, value: str, make: Callable[..., object], *args: object) -> None:
    """Call `make`, turning its ValueError into one that names the field.

    Raises:
        ValueError: `field: got value; reason`.
    """
    try:
        make(*args)
    except ValueError as error:
        reason = str(error).removeprefix(f"{field}: ")
        raise ValueError(reason_of(field, value, reason)) from error


def reason_of(field: str, value: str, reason: str) -> str:
    """One sentence for a bad value of a field."""
    return f"{field}: {reason}" if reason.startswith("got ") else f"{field}: got {value!r}; {reason}"
