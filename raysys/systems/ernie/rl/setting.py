"""Every constant of reinforcement learning. The paper gives none of its values; [P] marks a mechanism of the paper, and what
its text leaves open is marked INFERRED.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from raysys.data.multimodal import Form
from raysys.runtime.config import Config

Name = Literal["arithmetic", "count", "tones", "nextframe"]
NAMES: tuple[Name, ...] = ("arithmetic", "count", "tones", "nextframe")
"""The environments, in the order in which queries alternate."""


class ObjectiveSetting(Config):
    """The policy objective. The default is MISC (eq. 3): GSPO's ratio, IcePop's mask by token."""

    ratio: Literal["sequence", "token"] = "sequence"
    """sequence: GSPO; token: GRPO [P: both are compared]."""
    average: Literal["sequence", "token"] = "sequence"
    """Mean over tokens within an answer and then over answers [P, eq. 1], or over all tokens alike (DAPO)."""
    correction: Literal["off", "icepop", "tis"] = "icepop"
    """For what the rollout engine and the training engine disagree on: off, IcePop's mask [P], or truncated weights (TIS)."""
    level: Literal["token", "sequence"] = "token"
    """Of the correction: token [P, eqs. 1, 3] or one for an answer [P, eq. 2]. Ratio sequence with level token is MISC."""
    lower: float = Field(0.2, ge=0)
    """IcePop's bound a (INFERRED: 1/5, as prime-rl and open-instruct)."""
    upper: float = Field(5.0, gt=0)
    """IcePop's bound b, or the cap of TIS (INFERRED: 5, as prime-rl and open-instruct)."""
    clip_low: float = Field(0.05, gt=0)
    """Lower clip epsilon. GSPO's authors use 3e-4 for answers of thousands of tokens; ours have about five (INFERRED)."""
    clip_high: float = Field(0.05, gt=0)
    """Upper clip epsilon; larger than the lower one in DAPO, which uses .2 and .28 with token ratios."""
    scale: bool = True
    """Divide advantages by their group's standard deviation [P: GRPO]."""
    dynamic: bool = False
    """Leave queries whose answers are all right or all wrong out of the average (DAPO's dynamic sampling, for fixed batches)."""
    wpsm_alpha: float = Field(0.0, ge=0, le=1)
    """WPSM: how much of a mastered answer's weight is taken away; 0 is off, 1 drops it [P, eq. 4]."""
    wpsm_eta: float = Field(0.15, ge=0)
    """WPSM: an answer counts as certain below this mean entropy, in nats a token (INFERRED)."""
    wpsm_tau: float = Field(0.7, ge=0, le=1)
    """WPSM: a query counts as mastered above this success rate (INFERRED)."""
    wpsm_only_positive: bool = True
    """WPSM: only answers with a positive advantage (INFERRED: the name says positive samples, eq. 4 does not)."""

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if self.lower > self.upper:
            raise ValueError(f"lower: got {self.lower:g}; it must not exceed upper, which is {self.upper:g}")
        return self


class BufferSetting(Config):
    """The unbiased replay buffer U-RB."""

    batch: int = Field(80, ge=1)
    """Queries BS of an iteration, the capacity of the training pool [P]."""
    group: int = Field(8, ge=2)
    """Answers G of a query [P: GRPO]."""
    depth: int = Field(2, ge=1)
    """N: the inference pool holds BS N queries [P]. 1 is synchronous: nothing is begun before its own iteration."""
    slots: int = Field(0, ge=0)
    """Queries that are answered at the same time at most; 0 means BS (N + 1) / 2, so that some of the pool wait (INFERRED)."""
    calls: int = Field(16, ge=1)
    """Queries of one call to a rollout actor. It touches the numbers (how rows are batched), the number of actors does not."""


class HintSetting(Config):
    """AHRL (eq. 5)."""

    initial: float = Field(0.0, ge=0, lt=1)
    """p_init: share of the reference trace that is shown at first; 0 is off [P]."""
    gamma: float = Field(0.3, ge=0)
    """Annealing rate by iteration and pass rate (INFERRED)."""
    tries: int = Field(2, ge=1)
    """k of pass@k, which each training question is measured by before RL begins (INFERRED)."""
    floor: float = Field(0.05, ge=0, le=1)
    """Least pass rate reckoned with; 0 is eq. 5 as printed, which never anneals the hints of queries never solved (INFERRED)."""


class DifficultySetting(Config):
    """How hard the environments' questions are."""

    terms: int = Field(5, ge=2, le=8)
    """Arithmetic: numbers to add."""
    below: int = Field(4, ge=4, le=1000)
    """Arithmetic: numbers are smaller than this."""
    kinds: int = Field(0, ge=0, le=10)
    """Count: 0 asks for all digits; m (2 to 10) for one of m kinds, and only these occur."""
    tones: int = Field(3, ge=1, le=8)
    """Tones: how many follow each other."""
    candidates: int = Field(2, ge=2, le=4)
    """Next frame: to choose from."""
    turns: bool = False
    """Next frame: wrong candidates are off by a turn, which is harder than by half a digit."""

    def options(self, size: int, form: Form) -> dict[str, dict[str, Any]]:
        """The environments' options, for images of `size` pixels a side and sound of a form."""
        return {
            "arithmetic": {"terms": self.terms, "below": self.below},
            "count": {"kinds": self.kinds, "size": size},
            "tones": {"tones": self.tones, "form": form},
            "nextframe": {"candidates": self.candidates, "size": size, "turns": self.turns},
        }


class WeightSetting(Config):
    """Turns of each environment in a round of questions."""

    arithmetic: int = Field(1, ge=1)
    """Sums."""
    count: int = Field(1, ge=1)
    """Digits in an image."""
    tones: int = Field(1, ge=1)
    """Tones."""
    nextframe: int = Field(1, ge=1)
    """Next frames."""


class RLSetting(Config):
    """Reinforcement learning on all environments at once."""

    environments: tuple[Name, ...] = NAMES
    """Which environments are mixed; queries alternate between them."""
    weights: WeightSetting = WeightSetting(arithmetic=2)
    """Turns of the environments: sums are the hardest to hold on to while the others are learned (INFERRED)."""
    iterations: int = Field(70, ge=1)
    """Training iterations."""
    prompts: int = Field(1000, ge=1)
    """Training queries of each environment; they come again, in another order, when all were used."""
    limit: int = Field(16, ge=1, le=256)
    """Tokens of an answer at most, <eos> included."""
    temperature: float = Field(1.0, ge=1e-3)
    """Of rollouts. At 1 the drawn distribution is the policy itself."""
    minibatches: int = Field(2, ge=1)
    """Optimizer steps of an iteration, on disjoint parts of its queries: from the second on, pi_new differs from pi_old."""
    lr: float = Field(2e-4, gt=0)
    """Step size of AdamW; it rises over `warmup` and falls linearly to nothing at the end (INFERRED)."""
    warmup: int = Field(3, ge=0)
    """Iterations of linear warm-up."""
    clip: float = Field(1.0, gt=0)
    """Largest norm of a step's gradient."""
    objective: ObjectiveSetting = ObjectiveSetting()
    buffer: BufferSetting = BufferSetting()
    hints: HintSetting = HintSetting()
    replay_routes: bool = False
    """R3: the training engine takes the experts that the rollout engine chose; gates are computed anew [P cites 2510.11370]."""
    mismatch: Literal["none", "bf16", "router"] = "none"
    """What rollouts compute with, to imitate the engines of a real system, which one CPU engine does not have: the weights, the
    weights rounded to bfloat16, or router weights with noise."""
    sigma: float = Field(0.1, ge=0)
    """Noise of mismatch router, in standard deviations of each router's weights."""
    difficulty: DifficultySetting = DifficultySetting()
    test: int = Field(192, ge=1)
    """Held-out instances of each environment, answered before and after."""

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if not self.environments or len(set(self.environments)) < len(self.environments):
            raise ValueError(
                f"environments: got {list(self.environments)}; expected each at most once, and at least one"
            )
        if self.buffer.batch % self.minibatches:
            raise ValueError(
                f"minibatches: got {self.minibatches}; it must divide buffer.batch, which is {self.buffer.batch}"
            )
        return self


class WarmSetting(Config):
    """Supervised warm start on the environments' own format."""

    samples: int = Field(1600, ge=1)
    """Training instances of each environment."""
    steps: int = Field(190, ge=0)
    """Optimizer steps; 0 leaves the warm start out."""
    batch: int = Field(32, ge=1)
    """Instances of a step."""
    blocks: int = Field(2, ge=1)
    """Parts that a step is cut into: the number of training workers must divide it."""
    weights: WeightSetting = WeightSetting(arithmetic=6, tones=3, nextframe=4)
    """Turns of the environments: what is harder gets more (INFERRED)."""
    lr: float = Field(1.5e-3, gt=0)
    """Peak step size; warm-up over a tenth of the steps, then cosine."""

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.batch % self.blocks:
            raise ValueError(f"blocks: got {self.blocks}; it must divide batch, which is {self.batch}")
        return self
