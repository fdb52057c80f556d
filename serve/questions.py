"""What the app of adapters is asked and what it answers, as JSON: the schemas of its OpenAPI page."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

Text = Annotated[str, StringConstraints(min_length=1)]


class Question(BaseModel):
    """One text, or a pair of texts, and the adapter to classify it with."""

    model_config = ConfigDict(extra="forbid")
    text: Text = Field(examples=["a film to see twice"])
    second: Text | None = Field(None, description="Second text, for classifiers of pairs.")
    adapter: Text = Field("consensus", description="Name of an adapter, as GET /adapters lists them.")


class Questions(BaseModel):
    """Several texts at once, each with its own adapter. All are answered, or none."""

    model_config = ConfigDict(extra="forbid")
    requests: list[Question] = Field(min_length=1)


class Answer(BaseModel):
    """The most probable label, and the probability of each."""

    label: str
    probabilities: dict[str, float]
    adapter: str


class Answers(BaseModel):
    """In the order asked."""

    answers: list[Answer]


class Listing(BaseModel):
    """What this app serves."""

    adapters: list[str]
    labels: list[str]
    pair: bool
    model: str
