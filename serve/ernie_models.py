"""What the app of the unified model is asked and what it answers, as JSON: the schemas of its OpenAPI page."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

Media = Annotated[str, StringConstraints(min_length=1)]
MOST_PARTS = 32
MOST_SEED = 2**63 - 1
Kind = Literal["text", "image", "video", "audio"]


class Part(BaseModel):
    """One of: a text, an image, a video, a sound."""

    model_config = ConfigDict(extra="forbid")
    text: Annotated[str, StringConstraints(min_length=1)] | None = Field(None, examples=["a seven, bottom left"])
    image: Media | None = Field(None, description="PNG or JPEG, in base64; cut and resized to the model's canvas.")
    video: list[Media] | None = Field(None, min_length=1, max_length=64, description="Frames, each as an image.")
    audio: Media | None = Field(None, description="WAV (PCM), in base64; at most as long as the model's sounds.")

    @model_validator(mode="after")
    def _one(self) -> Self:
        given = [name for name in ("text", "image", "video", "audio") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"expected exactly one of text, image, video, audio; got {' and '.join(given) or 'none'}")
        return self


class Ask(BaseModel):
    """Parts in their order, and what is to be generated after them."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    input: list[Part] = Field(default_factory=list, max_length=MOST_PARTS)
    output: Kind = "text"
    temperature: float = Field(1.0, ge=0, le=4, strict=True, description="0 takes the most likely.")
    seed: int | None = Field(None, ge=0, le=MOST_SEED, strict=True, description="Drawn, and told, if there is none.")
    guidance: float = Field(
        0.0, ge=0, le=20, strict=True, description="Of images and videos: how hard to follow the text."
    )
    max_tokens: int | None = Field(None, ge=1, strict=True, description="Of text; see GET /info for the most.")
    frames: int | None = Field(None, ge=1, strict=True, description="Of a video (with those given), or of a sound.")
    budget: Annotated[str, StringConstraints(min_length=1, max_length=64)] | None = Field(
        None, description="Name of a sub-model, as GET /info lists them; the whole model by default."
    )
    latency_ms: float | None = Field(
        None,
        gt=0,
        le=1e6,
        strict=True,
        description="Instead: the largest sub-model whose text token takes at most this.",
    )
    continue_text: bool = Field(
        False,
        strict=True,
        description="Go on with the text of the input, which must come last, instead of answering it.",
    )
    stream: bool = Field(
        False, strict=True, description="Send parts as they are made: lines of JSON, or server-sent events by Accept."
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.budget is not None and self.latency_ms is not None:
            raise ValueError("latency_ms: got one beside a budget; expected one of the two")
        if self.guidance and self.output not in ("image", "video"):
            raise ValueError(f"guidance: is of images and videos; the output is {self.output}")
        if self.max_tokens is not None and self.output != "text":
            raise ValueError(f"max_tokens: is of texts; the output is {self.output}")
        if self.frames is not None and self.output not in ("video", "audio"):
            raise ValueError(f"frames: is of videos and sounds; the output is {self.output}")
        if self.continue_text and (self.output != "text" or not self.input or self.input[-1].text is None):
            raise ValueError("continue_text: is of texts, after an input that ends with one")
        return self


class Answer(BaseModel):
    """What was generated, and how. Media carry a mark that says so, too."""

    output: Kind
    text: str | None = None
    image: str | None = Field(None, description="PNG in base64.")
    video: list[str] | None = Field(None, description="PNGs in base64; with the first frames that were given.")
    audio: str | None = Field(None, description="WAV in base64.")
    generated: Literal[True] = True
    model: str = Field(description="Run and fingerprint of the weights.")
    budget: str
    seed: int
    ended: bool = Field(description="Whether the model ended by itself, before a limit.")
    steps: int = Field(description="Tokens of text, frames of sound, or scales of all frames.")
    seconds: float


class Budget(BaseModel):
    """A sub-model: a view on the same weights."""

    layers: list[int]
    active: int = Field(description="Experts of a token, of each layer.")
    parameters: int = Field(description="In all; those of layers that are passed over left out.")
    active_parameters: int = Field(description="That a token uses.")
    mflops: float = Field(description="Of a token, in the layers, at 128 tokens of context.")
    token_ms: float = Field(description="Measured when the replica started: a text token, alone, without load.")


class Info(BaseModel):
    """What this app serves."""

    model: str
    tasks: list[str] = Field(description="What there was data of.")
    data: str
    licence: str
    budgets: dict[str, Budget]
    weights_bytes: int = Field(description="Of the one copy that all budgets share.")
    limits: dict[str, Any]
    form: dict[str, Any] = Field(description="What pictures and sounds are brought to.")
