"""What requests and answers look like."""

from __future__ import annotations

import base64
import math
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

Sequence = Annotated[str, Field(description="Protein sequence, letters A to Z")]


class Request(BaseModel):
    model_config = ConfigDict(extra="forbid")


class EmbeddingsRequest(Request):
    """As OpenAI's, with `input` holding protein sequences."""

    input: Sequence | list[Sequence] = Field(examples=[["MKTAYIAKQR", "GSHMLEDPVA"]])
    model: str | None = Field(None, description="Name as in GET /v1/models; default: the only one")
    pooling: Literal["mean", "bos", "residue"] = "mean"
    encoding_format: Literal["float", "base64"] = Field(
        "float", description="base64 holds little-endian float32 and is far cheaper to read"
    )


class Embedding(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | list[list[float]] | str
    shape: list[int] = Field(description="[D], or [residues, D] with pooling residue")

    @classmethod
    def of(cls, index: int, array: np.ndarray, encoding_format: str) -> Embedding:
        if encoding_format == "base64":
            raw = np.ascontiguousarray(array, "<f4").tobytes()
            return cls(index=index, embedding=base64.b64encode(raw).decode(), shape=[*array.shape])
        return cls(index=index, embedding=array.tolist(), shape=[*array.shape])


class Usage(BaseModel):
    prompt_tokens: int = Field(description="Residues")
    total_tokens: int = Field(description="Residues")

    @classmethod
    def of(cls, sequences: list[str]) -> Usage:
        residues = sum(map(len, sequences))
        return cls(prompt_tokens=residues, total_tokens=residues)


class EmbeddingsResponse(BaseModel):
    object: Literal["list"] = "list"
    model: str
    data: list[Embedding]
    usage: Usage


class ScoresRequest(Request):
    """Likelihood of whole sequences."""

    sequences: Sequence | list[Sequence] = Field(examples=[["MKTAYIAKQR"]])
    model: str | None = Field(None, description="Name as in GET /v1/models; default: the only one")
    method: Literal["pseudo-ppl", "one-pass"] = Field(
        "pseudo-ppl", description="one-pass is cheaper and optimistic: no residue is masked"
    )


class Score(BaseModel):
    index: int
    score: float = Field(description="Mean log likelihood of the residues, nats; higher is better")
    perplexity: float = Field(description="exp(-score)")

    @classmethod
    def of(cls, index: int, score: float) -> Score:
        return cls(index=index, score=score, perplexity=math.exp(-score))


class ScoresResponse(BaseModel):
    object: Literal["list"] = "list"
    model: str
    method: str
    data: list[Score]
    usage: Usage


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    width: int
    layers: int
    parameters: int
    dtype: str
    max_residues: int
    lineage: dict[str, Any] = Field(description="Corpus, run, step and code; {} if unknown")


class ModelsResponse(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class ErrorDetail(BaseModel):
    type: str
    message: str
    param: str | None = None


class ErrorResponse(BaseModel):
    error: ErrorDetail
