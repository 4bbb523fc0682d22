"""Answers as bytes: JSON, with arrays as floats or base64, or an Arrow IPC stream.

Arrow: one row a sequence in the order of `index` (int64), with `values` (list<float32>, flattened
row by row) and `shape` (list<int64>); for scores `index` and `score` (float64). The schema's
metadata holds `model`, `weights` and `rows`, the number of rows to expect.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any

import numpy as np
import orjson
import pyarrow as pa

from serve.calls import Done
from serve.gateway.service import Whole

ARROW = "application/vnd.apache.arrow.stream"

ARRAYS = pa.schema(
    [("index", pa.int64()), ("values", pa.list_(pa.float32())), ("shape", pa.list_(pa.int64()))]
)
SCORES = pa.schema([("index", pa.int64()), ("score", pa.float64())])


def write_json(tree: dict[str, Any]) -> bytes:
    return orjson.dumps(tree, option=orjson.OPT_SERIALIZE_NUMPY)


def usage(residues: int) -> dict[str, int]:
    return {"prompt_tokens": residues, "total_tokens": residues}


def rows(arrays: Iterable[np.ndarray], field: str, encoding: str) -> list[dict[str, Any]]:
    """One row an array: its index, its numbers under `field`, its shape."""
    kind = {"object": "embedding"} if field == "embedding" else {}
    return [
        {**kind, "index": index, field: _encode(array, encoding), "shape": array.shape}
        for index, array in enumerate(arrays)
    ]


def score_rows(scores: Sequence[float], perplexity: bool) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {"index": index, "score": score} for index, score in enumerate(scores)
    ]
    for row in found if perplexity else ():
        row["perplexity"] = math.exp(min(-row["score"], 700.0))
    return found


def lineage_headers(model: str, source: Done | Whole) -> dict[str, str]:
    """Where an answer comes from, in short, and where its time went."""
    return {
        "X-Raptide-Model": model,
        "X-Raptide-Weights": source.weights,
        "X-Raptide-Step": "" if source.step is None else str(source.step),
        "Server-Timing": f"queue;dur={1e3 * source.queue_s:.1f}, "
        f"compute;dur={1e3 * source.compute_s:.1f}",
    }


async def arrow_arrays(
    model: str, num_rows: int, first: Done, rest: AsyncIterator[Done]
) -> AsyncIterator[bytes]:
    """An Arrow stream, a record batch for each run as it comes.

    Raises:
        BrokenStream: a later run failed, or came from other weights; the client sees the connection
            break and fewer rows than `rows` says.
    """
    sink = io.BytesIO()
    schema = ARRAYS.with_metadata(_metadata(model, first.weights, num_rows))
    writer = pa.ipc.new_stream(sink, schema)
    index = 0
    done: Done | None = first
    while done is not None:
        if done.weights != first.weights:
            raise BrokenStream("The model was updated while its answer was on its way.")
        writer.write_batch(_batch(index, done.arrays, schema))
        index += len(done.arrays)
        yield _drain(sink)
        done = await anext(rest, None)
    writer.close()
    yield _drain(sink)


def arrow_scores(model: str, weights: str, scores: Sequence[float]) -> bytes:
    sink = io.BytesIO()
    schema = SCORES.with_metadata(_metadata(model, weights, len(scores)))
    with pa.ipc.new_stream(sink, schema) as writer:
        columns = [pa.array(range(len(scores)), pa.int64()), pa.array(scores, pa.float64())]
        writer.write_batch(pa.record_batch(columns, schema=schema))
    return sink.getvalue()


class BrokenStream(Exception):
    """An answer that had begun cannot be finished."""


def _encode(array: np.ndarray, encoding: str) -> Any:
    array = np.ascontiguousarray(array, "<f4")
    return base64.b64encode(array.data).decode() if encoding == "base64" else array


def _metadata(model: str, weights: str, num_rows: int) -> dict[str, str]:
    return {"model": model, "weights": weights, "rows": str(num_rows)}


def _batch(first: int, arrays: Sequence[np.ndarray], schema: pa.Schema) -> pa.RecordBatch:
    flat = [np.ascontiguousarray(array, np.float32).reshape(-1) for array in arrays]
    ends = np.cumsum([0, *map(len, flat)]).astype(np.int32)
    values = pa.ListArray.from_arrays(pa.array(ends), pa.array(np.concatenate(flat)))
    shapes = pa.array([array.shape for array in arrays], pa.list_(pa.int64()))
    index = pa.array(range(first, first + len(arrays)), pa.int64())
    return pa.record_batch([index, values, shapes], schema=schema)


def _drain(sink: io.BytesIO) -> bytes:
    written = sink.getvalue()
    sink.seek(0)
    sink.truncate()
    return written
