"""Answers of the endpoint as numbers and arrays, in the order of the request.

What is no such answer is a ServiceError: other fields, shapes that do not fit what was asked for,
places named twice, and numbers that are none.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from typing import Any

import httpx
import numpy as np

from raptide.client.pieces import Piece
from raptide.client.refusals import BrokenAnswer
from raptide.errors import ServiceError

ARROW = "application/vnd.apache.arrow.stream"


class _Misfit(Exception):
    """Why an answer is none."""


def read_answer(answer: httpx.Response, chunk: Sequence[Piece]) -> list[Any]:
    """What each piece was answered with: an fp32 array, or a number for kinds that count.

    Arrays are read of an Arrow stream, or of base64 or lists of floats in JSON.

    Raises:
        BrokenAnswer: the answer ended early.
        ServiceError: it is no such answer.
    """
    rows: list[Any] = [None] * len(chunk)
    arrow = answer.headers.get("Content-Type", "").startswith(ARROW)
    try:
        for index, value in (_arrow_rows if arrow else _json_rows)(answer, chunk[0].kind.found):
            if not isinstance(index, int) or not 0 <= index < len(rows) or rows[index] is not None:
                raise _Misfit(f"it has a row {index!r} of {len(rows)}, or has it twice")
            rows[index] = _checked(value, chunk[index], index)
    except (_Misfit, ValueError, KeyError, TypeError, AttributeError, OverflowError) as misfit:
        reason = str(misfit) if isinstance(misfit, _Misfit) else "something else than was asked for"
        raise ServiceError(
            f"{answer.url} answered with what is none ({reason}); is it a Raptide endpoint?"
        ) from None
    if any(row is None for row in rows):
        if not arrow:
            raise ServiceError(
                f"{answer.url} answered {sum(row is not None for row in rows)} of {len(rows)} "
                "sequences; is it a Raptide endpoint?"
            )
        # A stream that is cut between two batches reads as one that has ended.
        raise BrokenAnswer("its answer ended early")
    return rows


def read_model(answer: httpx.Response) -> dict[str, Any]:
    """What GET /v1/models/NAME says.

    Raises:
        ServiceError: it is no such answer.
    """
    try:
        model = answer.json()
    except ValueError:
        model = None
    if not isinstance(model, dict):
        raise ServiceError(f"{answer.url} describes no model; is it a Raptide endpoint?")
    return model


def read_models(answer: httpx.Response) -> list[dict[str, Any]]:
    """What GET /v1/models says.

    Raises:
        ServiceError: it is no such answer.
    """
    try:
        models = answer.json()["data"]
        if models and all(isinstance(model["id"], str) for model in models):
            return [*models]
    except (ValueError, KeyError, TypeError):
        pass
    raise ServiceError(f"{answer.url} names no models; is it a Raptide endpoint?")


def _json_rows(answer: httpx.Response, found: str) -> Any:
    """Index and value of each row of JSON."""
    for item in answer.json()["data"]:
        value = item[found]
        if found == "score":
            yield item["index"], value
            continue
        if isinstance(value, str):
            value = np.frombuffer(base64.b64decode(value, validate=True), "<f4")
        yield item["index"], np.array(value, np.float32).reshape(item["shape"])


def _arrow_rows(answer: httpx.Response, found: str) -> Any:
    """The same of columns `index`, `values` (flat) and `shape`, one row a sequence."""
    import pyarrow as pa  # late: what asks for small answers alone need not load it

    try:
        for batch in pa.ipc.open_stream(answer.content):
            columns = (batch.column(name) for name in ("index", "values", "shape"))
            for index, values, shape in zip(*columns, strict=True):
                # A copy, so that one result does not hold the memory of all.
                flat = values.values.to_numpy().astype(np.float32)
                yield index.as_py(), flat.reshape(shape.as_py())
    except (pa.ArrowInvalid, OSError) as error:
        raise BrokenAnswer(str(error)) from None


def _checked(value: Any, piece: Piece, index: int) -> Any:
    if piece.kind.counts:
        number = float(value)
        if not math.isfinite(number):
            raise _Misfit(f"the score of sequence {index} is {number}")
        return number
    fits = len(value.shape) == len(piece.shape) and all(
        wanted in (None, size) for wanted, size in zip(piece.shape, value.shape, strict=True)
    )
    if not fits:
        raise _Misfit(
            f"sequence {index} of {len(piece.letters)} residues has {value.shape} numbers"
        )
    if not np.isfinite(value).all():
        raise _Misfit(f"the numbers of sequence {index} are not all numbers")
    return value
