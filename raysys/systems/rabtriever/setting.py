"""What is learned, from what, and how: the part of the configuration that decides numbers."""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import Field, model_validator

from raysys.nn.pretrained import MINILM
from raysys.runtime.config import Config
from raysys.systems.rabtriever.predictor import Combine


class TeacherSetting(Config):
    """The generative reranker and its training."""

    model: str = "bridge"
    """bridge: a tiny causal transformer over the vectors of a frozen encoder; or a causal language model by path or id."""
    encoder: str = MINILM
    """Bridge only: the frozen text encoder, minilm (ships with a package) or a path or id."""
    units: Literal["pooled", "chunks", "tokens"] = "pooled"
    """Bridge only: a text as one mean vector, as --chunks mean vectors of equal spans, or as one vector per token."""
    chunks: int = Field(4, ge=2, le=64)
    """Bridge only: spans of a text with units chunks."""
    width: int = Field(128, ge=8, le=4096)
    """Bridge only: hidden size d."""
    layers: int = Field(2, ge=1, le=48)
    """Bridge only: layers of the causal transformer."""
    max_document: int = Field(32, ge=1, le=4096)
    """Tokens L_D of a document's part of the prompt [P: 32]."""
    max_query: int = Field(512, ge=8, le=32_768)
    """Tokens of a query's part of the prompt, the question included; the oldest words go first."""
    lora_rank: int = Field(0, ge=0, le=1024)
    """Language model only: train LoRA factors of this rank on its linear layers and merge them; 0 trains all weights."""
    objective: Literal["sft", "sft+dpo"] = "sft"
    """sft: cross-entropy on the answer [P: the paper's teacher]; sft+dpo: then preferences T over F and F over T (LaHoRe-DPO)."""
    dpo_steps: int = Field(100, ge=1)
    """Steps of the second stage; its step size is a tenth of --lr."""
    dpo_beta: float = Field(0.1, gt=0)
    """Strength beta of the second stage."""
    steps: int = Field(300, ge=1)
    """Optimizer steps."""
    batch: int = Field(64, ge=1)
    """Queries per step, each with one positive and --negatives other documents."""
    negatives: int = Field(7, ge=0)
    """Negatives per query and step; 0: all other documents [P: 1:all]."""
    blocks: int = Field(4, ge=1)
    """Parts that a step is cut into: the number of training workers must divide it. It touches the numbers, workers do not."""
    lr: float = Field(2e-3, gt=0)
    """Peak step size: warm-up over a tenth of the steps, then cosine. A pretrained language model wants 1e-6 [P] to 1e-5."""
    auxiliary: float = Field(2.0, ge=0)
    """Weight of the loss that keeps document states informative (bridge: back to the own vector; language model: next token)."""

    @model_validator(mode="after")
    def _fits_the_bridge(self) -> Self:
        if self.model == "bridge" and self.lora_rank:
            raise ValueError(
                f"lora_rank: got {self.lora_rank} with model bridge, all of whose weights are trained; give 0"
            )
        if self.model == "bridge" and self.width % 8:
            raise ValueError(f"width: got {self.width}; four heads with rotary positions need a multiple of 8")
        return self


class StudentSetting(Config):
    """The predictor and its distillation."""

    combine: Combine = "mul"
    """How query and document vectors meet: mul [P], film, gated, add, none (the ablation without multiplication)."""
    additive: bool = True
    """Add B(q) to the predicted state: no ranking changes, but the teacher's mean can be met. The paper has none."""
    standardise: bool = True
    """Standardise document vectors by coordinate, and the MSE by the teacher's variance. The paper does neither."""
    layers: int = Field(2, ge=1, le=3)
    """Layers of the predictor's MLP [P: 2 best of 1 to 3]."""
    hidden: int = Field(256, ge=1, le=65_536)
    """Its hidden width (not stated in the paper)."""
    loss: Literal["jepa", "listwise", "listwise_reverse", "margin_mse", "infonce"] = "jepa"
    """jepa: MSE of states + KL of answers [P]; listwise, margin_mse: the teacher's scores alone; infonce: labels, no teacher."""
    match: Literal["mse", "contrastive"] = "mse"
    """How states are compared: mse [P], or contrastive among the documents of a query (the ablation)."""
    mse_weight: float = Field(1.0, ge=0)
    """Weight of the comparison of states."""
    kl: Literal["reverse", "forward", "jsd"] = "forward"
    """Direction of the KL of answers: reverse [P], forward, or the symmetric JSD. Reverse drifts to "always F" here, the more
    the larger its weight (docs/rabtriever.md)."""
    kl_weight: float = Field(100.0, ge=0)
    """Weight w. The paper says 0.25 in the text and 1/40 in the appendix, for a 7B model's states; here the MSE is in units of
    the states' variance and most of it cannot be removed (see the closed-form least residual), so w must be larger to be
    heard."""
    kl_samples: int = Field(0, ge=0, le=1024)
    """0: exact KL over the vocabulary; k: the sampled on-policy estimator (reverse only) with k answers per pair."""
    rollout: Literal["all", "random", "onpolicy"] = "onpolicy"
    """Documents per query and step: all [P], a positive and random ones, or half of these from the student's own top --top."""
    group: int = Field(16, ge=2)
    """Documents per query and step with rollout random or onpolicy."""
    top: int = Field(12, ge=1)
    """How many of its best documents the student may be asked about."""
    refresh: int = Field(50, ge=1)
    """Steps between searches of the student's own best documents."""
    steps: int = Field(400, ge=1)
    """Optimizer steps."""
    batch: int = Field(64, ge=1)
    """Queries per step."""
    blocks: int = Field(2, ge=1)
    """Parts that a step is cut into, as for the teacher."""
    lr: float = Field(2e-3, gt=0)
    """Peak step size; warm-up over a tenth of the steps, then cosine. The paper's 1e-6 moves a new MLP nowhere."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.kl_samples and self.kl != "reverse":
            raise ValueError(
                f"kl_samples: got {self.kl_samples} with kl {self.kl}; the sampled estimator is of the reverse KL"
            )
        if self.loss == "jepa" and not self.mse_weight and not self.kl_weight:
            raise ValueError("kl_weight: got 0 with mse_weight 0; the loss would be zero everywhere")
        return self


class Setting(Config):
    """Distil a generative reranker into a retriever."""

    data: str = "rationale"
    """rationale or facts (generated; options in brackets), skills, or a folder: BEIR format, StrategyQA, BANKING77, CLINC150,
    ESConv, SayCan."""
    queries: int = Field(0, ge=0)
    """Training queries used (a seeded choice); 0 means all."""
    test: int = Field(0, ge=0)
    """Test queries used (a seeded choice); 0 means all."""
    teacher: TeacherSetting = TeacherSetting()
    student: StudentSetting = StudentSetting()


def cosine(peak: float, step: int, steps: int) -> float:
    """Step size: linear warm-up over the first tenth, then a half cosine to zero."""
    warm = max(1, steps // 10)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
