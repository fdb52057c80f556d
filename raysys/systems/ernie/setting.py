"""What can be set about the model, its elastic training and its optimizer.

The paper discloses neither layer count, widths, expert count nor k of ERNIE 5.0; these are sizes for two CPU cores. Where a
default is the paper's, its section is named.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Self

from pydantic import Field, model_validator

from raysys.runtime.config import Config


class Sizes(NamedTuple):
    """What the tokenizers fix: text ids, bits of a visual token, scales, codes of a level, levels, and features to look at."""

    vocabulary: int
    bits: int
    scales: tuple[tuple[int, int], ...]
    codes: int
    levels: int
    cnn: int
    channels: int


class FormSetting(Config):
    """What all data is brought to (`raysys.data.multimodal.Form`)."""

    frames: int = Field(4, ge=1, le=64)
    """Frames of a video."""
    channels: Literal[1, 3] = 1
    """1 grey, 3 colour."""
    height: int = Field(16, ge=8, le=512)
    """Pixels, a multiple of 4."""
    width: int = Field(16, ge=8, le=512)
    """Pixels, a multiple of 4."""
    rate: int = Field(4000, ge=1000, le=48_000)
    """Samples per second of audio."""
    samples: int = Field(2048, ge=64)
    """Samples of an audio."""
    tones: int = Field(1500, ge=1)
    """Tones drawn for training (embedded data)."""
    videos: int = Field(1500, ge=1)
    """Videos drawn for training (embedded data)."""
    held_out: int = Field(200, ge=1)
    """Videos and tones drawn for testing (embedded data)."""
    piece: int = Field(400, ge=16)
    """Most characters of a piece of text."""


class ModelSetting(Config):
    """The backbone: identical layers of attention and a mixture of experts, over all modalities."""

    width: int = Field(96, ge=8)
    """Size of a token's state."""
    layers: int = Field(7, ge=2)
    """Layers; the audio code levels are predicted by as many of the top ones."""
    heads: int = Field(4, ge=1)
    """Attention heads."""
    experts: int = Field(64, ge=1)
    """Routed experts of each layer."""
    active: int = Field(4, ge=1)
    """k, routed experts of a token."""
    expert_width: int = Field(32, ge=1)
    """Inner width of a routed expert."""
    shared_width: int = Field(96, ge=0)
    """Inner width of the shared expert; 0 for none."""
    score: Literal["sigmoid", "softmax"] = "sigmoid"
    """Router scores."""
    balance: Literal["bias", "aux", "both", "none"] = "bias"
    """bias: auxiliary-loss-free, as the paper; aux: the Switch loss and a z-loss; both; or none."""
    bias_speed: float = Field(3e-3, gt=0)
    """u, by which a selection bias moves in a step. The paper's 1e-4 is for more steps."""
    aux_weight: float = Field(1e-2, ge=0)
    """Weight of the Switch loss (aux, both)."""
    z_weight: float = Field(1e-3, ge=0)
    """Weight of the router's z-loss (aux, both)."""
    routing: Literal["agnostic", "separated"] = "agnostic"
    """agnostic: one pool of experts for all modalities (the paper); separated: a third of them for each (ERNIE 4.5's way)."""
    mtp_weight: float = Field(0.3, ge=0)
    """Weight of multi-token prediction on text (Section 5.1: .3, later .1); 0 leaves its module out."""
    rope_base: float = Field(1e6, gt=1)
    """Base of the rotary angles (Section 5.1)."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.width % (2 * self.heads):
            raise ValueError(f"width: got {self.width} for {self.heads} heads; expected an even number for each head")
        if self.routing == "separated" and self.balance in ("aux", "both"):
            raise ValueError(f"balance: got {self.balance} with separated routing, whose pools only bias balances")
        if self.active > self.experts:
            raise ValueError(f"active: got {self.active} of {self.experts} experts")
        return self


class ElasticSetting(Config):
    """Which sub-models are sampled in training, for each row of a batch by itself (Section 3.3)."""

    depth: float = Field(0.25, ge=0, le=1)
    """Probability of a reduced depth."""
    width: float = Field(0.2, ge=0, le=1)
    """Probability that a row may use a random subset of experts only."""
    sparsity: float = Field(0.2, ge=0, le=1)
    """Probability of fewer active experts, uniformly from 1 to k - 1."""
    share: float = Field(0.5, gt=0, le=1)
    """Part of the experts that a subset has (Section 6.4.2: 32 of 64)."""

    @property
    def off(self) -> bool:
        return not (self.depth or self.width or self.sparsity)


class Counts(Config):
    """Samples of each task."""

    lm: int = Field(2, ge=0)
    """Pieces of running text."""
    t2i: int = Field(8, ge=0)
    """Images from captions."""
    i2t: int = Field(16, ge=0)
    """Captions from images."""
    t2v: int = Field(2, ge=0)
    """Next frames of videos."""
    v2t: int = Field(6, ge=0)
    """Captions from videos."""
    t2a: int = Field(4, ge=0)
    """Audio from captions."""
    a2t: int = Field(4, ge=0)
    """Transcriptions."""

    @model_validator(mode="after")
    def _some(self) -> Self:
        if not any(self.model_dump().values()):
            raise ValueError("samples: got none; expected some of one task at least")
        return self


class PretrainSetting(Config):
    """Optimization of the backbone."""

    steps: int = Field(300, ge=1)
    """Optimizer steps."""
    samples: Counts = Counts()
    """Samples of each task in a block."""
    blocks: int = Field(1, ge=1)
    """Parts of a step's batch; the number of workers must divide it."""
    row: int = Field(192, ge=16)
    """Tokens of a packed row."""
    lr: float = Field(2e-3, gt=0)
    """Highest learning rate (AdamW)."""
    warmup: int = Field(20, ge=0)
    """Steps of linear warm-up, after which the rate is constant."""
    cooldown: float = Field(0.3, ge=0, le=1)
    """Last part of the steps, over which the rate falls to 0 linearly (warm-up, stable, decay)."""
    weight_decay: float = Field(0.1, ge=0)
    """Of matrices."""
    flip: float = Field(0.1, ge=0, le=0.5)
    """Largest probability that a bit of the visual history is flipped in training (self-correction)."""
    unconditional: float = Field(0.1, ge=0, lt=1)
    """Part of the images, videos and tones to be generated that come without their caption, for guidance."""
    elastic: ElasticSetting = ElasticSetting()
    """Sub-models in training."""
