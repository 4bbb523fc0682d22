"""Answers of the endpoint as numbers and arrays, in the order of the request."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import httpx
import numpy as np
import pyarrow as pa

from raptide.client.transport import BrokenAnswer
from raptide.errors import ServiceError

ARROW = "application/vnd.apache.arrow.stream"


def read_arrays(answer: httpx.Response, field: str, count: int) -> list[np.ndarray]:
    """`count` fp32 arrays, of an Arrow stream, or of base64 or lists of floats in JSON.

    Raises:
        BrokenAnswer: the answer ended early.
        ServiceError: it is no such answer.
    """
    rows: list[Any] = [None] * count
    if answer.headers.get("Content-Type", "").startswith(ARROW):
        _fill_from_arrow(rows, answer.content)
    else:
        for item in read_data(answer, ("index", field, "shape")):
            value = item[field]
            if isinstance(value, str):
                value = np.frombuffer(base64.b64decode(value), "<f4").astype(np.float32)
            rows[item["index"]] = np.asarray(value, np.float32).reshape(item["shape"])
    return _whole(rows)


def read_scores(answer: httpx.Response, count: int) -> list[float]:
    """`count` scores.

    Raises:
        BrokenAnswer, ServiceError: as in `read_arrays`.
    """
    rows: list[Any] = [None] * count
    for item in read_data(answer, ("index", "score")):
        rows[item["index"]] = float(item["score"])
    return _whole(rows)


def read_data(answer: httpx.Response, fields: Sequence[str]) -> Sequence[dict[str, Any]]:
    """The items of a JSON answer, each with at least these fields.

    Raises:
        ServiceError: it is no such answer.
    """
    try:
        items = answer.json()["data"]
        if all(set(fields) <= item.keys() for item in items):
            return items
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ServiceError(
        f"{answer.url} answered with something else than expected; is it a Raptide endpoint?"
    )


def _fill_from_arrow(rows: list[Any], stream: bytes) -> None:
    """Columns `index`, `values` (flat) and `shape`, one row a sequence."""
    try:
        for batch in pa.ipc.open_stream(stream):
            columns = (batch.column(name) for name in ("index", "values", "shape"))
            for index, values, shape in zip(*columns, strict=True):
                # A copy, so that one result does not hold the memory of all.
                flat = values.values.to_numpy().astype(np.float32)
                rows[index.as_py()] = flat.reshape(shape.as_py())
    except (pa.ArrowInvalid, OSError) as error:
        raise BrokenAnswer(str(error)) from None


def _whole(rows: list[Any]) -> list[Any]:
    """An Arrow stream that is cut between two batches reads as one that has ended."""
    if any(row is None for row in rows):
        raise BrokenAnswer("its answer ended early")
    return rows
