"""What requests and answers look like. answers.py writes the answers; their classes here are what
the OpenAPI document says of them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from raptide.methods import Pooling, ScanMethod, ScoreMethod, VariantMethod

LETTERS = r"^\s*[A-Za-z][A-Za-z\s]*\*?\s*$"
"""For the document alone: the service checks letters itself, and says which one is wrong."""

Sequence = Annotated[
    str,
    Field(
        description="Protein sequence, letters A to Z",
        json_schema_extra={"pattern": LETTERS, "minLength": 1},
    ),
]
Several = Annotated[list[Sequence], Field(json_schema_extra={"minItems": 1})]
Encoding = Literal["float", "base64"]

State = Literal["ready", "idle", "unavailable"]

EXAMPLE = ["MKTAYIAKQR", "GSHMLEDPVA"]


class Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = Field(None, description="Name as in GET /v1/models; default: the first")


class ArrayRequest(Request):
    encoding_format: Encoding | None = Field(
        "float", description="base64 holds little-endian float32 and is far cheaper to read"
    )


class EmbeddingsRequest(ArrayRequest):
    """As OpenAI's, with `input` holding protein sequences."""

    input: Sequence | Several = Field(examples=[EXAMPLE])
    pooling: Pooling | None = Field(
        "mean", description="mean over residues, the first token, or one vector a residue"
    )
    layers: list[Annotated[int, Field(ge=-256, le=256)]] | None = Field(
        None,
        description="0 is the embedding, i the output of layer i, -1 the last; default: [-1]",
        json_schema_extra={"minItems": 1, "maxItems": 256},
        examples=[[-1]],
    )
    dimensions: int | None = Field(
        None, ge=1, description="The model's width, or another is refused; vectors are never cut"
    )
    user: str | None = Field(None, description="Taken, as OpenAI clients may send it; not used")


class ScoresRequest(Request):
    """Whole `sequences`, or `variants` of one `sequence`."""

    sequences: Sequence | Several | None = Field(None, examples=[EXAMPLE])
    sequence: Sequence | None = Field(None, examples=[None])
    variants: list[str] | None = Field(
        None,
        description="Substitutions counted from 1: A42G, several joined as A42G:K50R",
        json_schema_extra={"minItems": 1},
        examples=[None],
    )
    method: Literal[ScoreMethod, VariantMethod] | None = Field(
        None,
        description="sequences: pseudo-ppl (default), one-pass (cheaper, optimistic); variants: "
        "wt-marginals (default), masked-marginals, pseudo-ppl",
        examples=[None],
    )


class ScanRequest(ArrayRequest):
    """Every single substitution of one sequence."""

    sequence: Sequence = Field(examples=[EXAMPLE[0]])
    method: ScanMethod | None = "wt-marginals"


class SequencesRequest(ArrayRequest):
    """One array for each sequence."""

    sequences: Sequence | Several = Field(examples=[EXAMPLE])


class LogitsRequest(SequencesRequest):
    """Logits of every residue, or log probabilities where residues are masked."""

    masked_positions: list[list[int]] | None = Field(
        None,
        description="A list a sequence, counted from 1: each position is masked in a pass of its "
        "own, and the answer has a row of log probabilities for each, in this order",
        examples=[None],
    )


class Usage(BaseModel):
    prompt_tokens: int = Field(description="Residues")
    total_tokens: int = Field(description="Residues")


class Embedding(BaseModel):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | list[list[float]] | list[list[list[float]]] | str
    shape: list[int] = Field(description="[D], or [residues, D]; several layers come first")


class EmbeddingsResponse(BaseModel):
    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: Usage


class Score(BaseModel):
    index: int
    score: float = Field(
        description="nats; higher is likelier. Of a sequence, the mean log likelihood of its "
        "residues; of a variant, its log likelihood less the sequence's"
    )
    perplexity: float | None = Field(None, description="exp(-score) of a sequence")


class ScoresResponse(BaseModel):
    object: Literal["list"]
    model: str
    method: str
    data: list[Score]
    usage: Usage


class Table(BaseModel):
    index: int
    values: list[list[float]] | str = Field(description="Row by row")
    shape: list[int]


class TablesResponse(BaseModel):
    object: Literal["list"]
    model: str
    data: list[Table]
    columns: list[str] | None = Field(None, description="What the last axis counts")
    usage: Usage


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    state: State
    width: int = Field(0, description="This and what follows is left out until a replica has told")
    layers: int = 0
    parameters: int = 0
    dtype: str = ""
    max_residues: int = 0
    calls: list[str] = Field(
        [],
        description="Paths under /v1 that it answers: contacts need a contact head; logits, scan "
        "and scores a language-model head",
    )
    weights: str = Field("", description="Digest of the weights")
    verified: bool = Field(
        False, description="A known sequence was answered as the bundle records it"
    )
    tokens: list[str] = Field([], description="The columns of logits")
    lineage: dict[str, Any] = Field({}, description="Corpus, run, step and code; {} if unknown")


class ModelsResponse(BaseModel):
    object: Literal["list"]
    data: list[Model]


class Replica(BaseModel):
    node: str
    weights: str
    step: int | None
    queued_tokens: int
    pending_tokens: int = Field(description="Queued, or being computed")
    residues_per_s: float


class Version(BaseModel):
    weights: str
    step: int | None
    replicas: int


class ModelStatus(BaseModel):
    id: str
    state: State
    queued_tokens: int
    residues_per_s: float = Field(description="Answered, over the last half minute")
    versions: list[Version]
    replicas: list[Replica]


class StatusResponse(BaseModel):
    object: Literal["list"]
    data: list[ModelStatus]


class Status(BaseModel):
    status: str


class Readiness(Status):
    models: dict[str, State]


class ErrorDetail(BaseModel):
    type: str
    message: str
    param: str | None


class ErrorResponse(BaseModel):
    error: ErrorDetail


class Unready(ErrorResponse):
    models: dict[str, State]
