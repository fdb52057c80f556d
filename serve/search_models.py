"""What the app of the retriever is asked and what it answers, as JSON: the schemas of its OpenAPI page."""

from __future__ import annotations

from typing import Annotated

from fastapi import Response
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints


def _worded(text: str) -> str:
    if not text.strip():
        raise ValueError("expected a text with a character that is no space")
    return text


def _plain(id: str) -> str:
    if not id.isprintable() or id != id.strip() or not set(id) - {"."}:
        raise ValueError("expected printable characters, no space at either end, and not dots alone")
    return id


Text = Annotated[str, StringConstraints(min_length=1), AfterValidator(_worded)]
Id = Annotated[str, StringConstraints(min_length=1, max_length=200), AfterValidator(_plain)]


class Query(BaseModel):
    """A text, and how many documents are wanted for it."""

    model_config = ConfigDict(extra="forbid")
    query: Text = Field(examples=["I was passed over for promotion again and I feel worthless."])
    k: int = Field(10, ge=1, strict=True, description="Documents wanted; fewer if the index has fewer.")
    rerank: bool = Field(
        False, strict=True, description="Let the teacher read each found document with the query; best first."
    )
    explain: bool = Field(False, strict=True, description="Also give what the teacher is asked about each document.")


class Queries(BaseModel):
    """Several queries at once. All are answered, in order, or none."""

    model_config = ConfigDict(extra="forbid")
    requests: list[Query] = Field(min_length=1)


class Result(BaseModel):
    """A document that was found."""

    id: str
    score: float = Field(
        description="Log-odds, by the student, that the document is a right response: <u(q), z> + c(q)."
    )
    probability: float = Field(description="The sigmoid of the score.")
    text: str
    teacher: float | None = Field(None, description="The teacher's log-odds, where it was asked.")
    prompt: str | None = Field(None, description="What the teacher is asked, where that was wanted.")


class Found(BaseModel):
    """Documents, best first: by `teacher` after reranking, else by `score`."""

    results: list[Result]
    version: str = Field(description="The version of the index that was searched, with all changes since.")
    seconds: float


class Answers(BaseModel):
    """In the order asked."""

    answers: list[Found]


class Document(BaseModel):
    """A document to be found from now on, over the one of the same id."""

    model_config = ConfigDict(extra="forbid")
    id: Id
    text: Text


class Documents(BaseModel):
    """Documents to add."""

    model_config = ConfigDict(extra="forbid")
    documents: list[Document] = Field(min_length=1)


class Stored(BaseModel):
    """How many documents are durable now, and found by every search from now on."""

    documents: int


class Index(BaseModel):
    """What is searched."""

    version: str
    kind: str
    shards: int
    documents: int
    changed: int = Field(
        description="Documents added or replaced since the version was made; POST /index:compact folds them in."
    )
    fingerprint: str
    compacting: str | None = Field(None, description="The version that is being made.")
    problem: str | None = Field(
        None, description="Why the newest version is not served, or the last compaction failed."
    )


class Started(BaseModel):
    """A compaction that has begun."""

    version: str


def written(answer: BaseModel) -> Response:
    """An answer as JSON, without FastAPI's second validation of it."""
    return Response(answer.model_dump_json(), media_type="application/json")
