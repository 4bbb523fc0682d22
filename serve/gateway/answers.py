"""Answers as bytes: JSON, with arrays as floats or base64, or an Arrow IPC stream.

Both are made in pieces of about PIECE_BYTES, so that an answer costs little more than its arrays,
and in a thread where it is large, so that others are answered meanwhile.

Arrow: one row a sequence in the order of `index` (int64), with `values` (list<float32>, flattened
row by row) and `shape` (list<int64>); for scores `index` and `score` (float64). The schema's
metadata holds `model`, `weights` and `rows`, the number of rows to expect.
"""

from __future__ import annotations

import asyncio
import base64
import io
import math
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import orjson
import pyarrow as pa

from serve.calls import Done
from serve.gateway.refusals import updated
from serve.gateway.service import Whole
from serve.gateway.sizes import Encoding

ARRAYS = pa.schema(
    [("index", pa.int64()), ("values", pa.list_(pa.float32())), ("shape", pa.list_(pa.int64()))]
)
SCORES = pa.schema([("index", pa.int64()), ("score", pa.float64())])

PIECE_NUMBERS = 3 * 2**13
"""Numbers written at a time, in about a millisecond: nothing else runs meanwhile. A multiple of
three, so that their base64 can be joined."""

PIECE_BYTES = 2**19
"""Bytes sent at a time."""

SMALL_BYTES = 2**18
"""Arrays up to this are written at once, in the event loop."""


def write_json(tree: Any) -> bytes:
    return orjson.dumps(tree, option=orjson.OPT_SERIALIZE_NUMPY)


def usage(residues: int) -> dict[str, int]:
    return {"prompt_tokens": residues, "total_tokens": residues}


def json_arrays(
    head: dict[str, Any],
    arrays: list[np.ndarray],
    field: str,
    encoding: Encoding,
    tail: dict[str, Any],
) -> Iterator[bytes]:
    """A JSON object in pieces: `head`, then `data` with a row an array, then `tail`.

    Arrays leave the list as they are written.
    """
    yield write_json(head)[:-1] + b',"data":['
    index = 0
    while arrays:
        if index:
            yield b","
        if arrays[0].size > PIECE_NUMBERS:
            yield from _large_row(index, arrays.pop(0), field, encoding)
            index += 1
            continue
        rows = [_row(index, arrays.pop(0), field, encoding)]
        numbers = math.prod(rows[0]["shape"])
        while arrays and (numbers := numbers + arrays[0].size) <= PIECE_NUMBERS:
            rows.append(_row(index + len(rows), arrays.pop(0), field, encoding))
        yield write_json(rows)[1:-1]
        index += len(rows)
    yield b"]," + write_json(tail)[1:]


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


def joined(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes in pieces of PIECE_BYTES or a little more, but for the last."""
    held: list[bytes] = []
    size = 0
    for piece in pieces:
        held.append(piece)
        size += len(piece)
        if size >= PIECE_BYTES:
            yield b"".join(held)
            held, size = [], 0
    if held:
        yield b"".join(held)


async def in_thread(
    pieces: Iterator[bytes], observe: Callable[[float], None]
) -> AsyncIterator[bytes]:
    """Each piece, made in another thread when it is asked for.

    Args:
        observe: gets the seconds that making them took, at the end.
    """
    spent = 0.0
    while True:
        started = time.monotonic()
        piece = await asyncio.to_thread(next, pieces, None)
        spent += time.monotonic() - started
        if piece is None:
            break
        yield piece
    observe(spent)


async def arrow_arrays(
    model: str,
    num_rows: int,
    first: Done,
    rest: AsyncIterator[Done],
    observe: Callable[[float], None],
) -> AsyncIterator[bytes]:
    """An Arrow stream, in pieces, as the runs come.

    Raises:
        Refusal: a later run failed, or came from other weights; the client sees the connection
            break and fewer rows than `rows` says.
    """
    weights = first.weights
    stream = _ArrowStream(ARRAYS.with_metadata(_metadata(model, weights, num_rows)))
    done: Done | None = first
    del first
    while done is not None:
        if done.weights != weights:
            raise updated()
        async for piece in in_thread(stream.write(done.arrays), observe):
            yield piece
        done = None  # its arrays may go while others are awaited
        done = await anext(rest, None)
    yield stream.end()


def arrow_scores(model: str, weights: str, scores: Sequence[float]) -> bytes:
    sink = io.BytesIO()
    schema = SCORES.with_metadata(_metadata(model, weights, len(scores)))
    with pa.ipc.new_stream(sink, schema) as writer:
        columns = [pa.array(range(len(scores)), pa.int64()), pa.array(scores, pa.float64())]
        writer.write_batch(pa.record_batch(columns, schema=schema))
    return sink.getvalue()


def _row(index: int, array: np.ndarray, field: str, encoding: Encoding) -> dict[str, Any]:
    kind = {"object": "embedding"} if field == "embedding" else {}
    plain: Any = np.ascontiguousarray(array, "<f4")
    if encoding == "base64":
        plain = base64.b64encode(plain.data).decode()
    return {**kind, "index": index, field: plain, "shape": array.shape}


def _large_row(index: int, array: np.ndarray, field: str, encoding: Encoding) -> Iterator[bytes]:
    """What `write_json(_row(...))` is, in pieces."""
    start, end = write_json(_row(index, array[:0], field, encoding) | {"shape": array.shape}).split(
        b'""' if encoding == "base64" else b"[]", 1
    )
    yield start
    yield from _base64(array) if encoding == "base64" else _floats(array)
    yield end


def _floats(array: np.ndarray) -> Iterator[bytes]:
    """Nested lists of decimal fractions, a few rows at a time."""
    if array.size <= PIECE_NUMBERS:
        yield orjson.dumps(np.ascontiguousarray(array, "<f4"), option=orjson.OPT_SERIALIZE_NUMPY)
        return
    row = array.size // len(array)
    step = max(1, PIECE_NUMBERS // row)
    for start in range(0, len(array), step):
        yield b"," if start else b"["
        if row > PIECE_NUMBERS:
            yield from _floats(array[start])
        else:
            (rows,) = _floats(array[start : start + step])
            yield rows[1:-1]
    yield b"]"


def _base64(array: np.ndarray) -> Iterator[bytes]:
    flat = np.ascontiguousarray(array, "<f4").reshape(-1)
    yield b'"'
    for start in range(0, len(flat), PIECE_NUMBERS):
        yield base64.b64encode(flat[start : start + PIECE_NUMBERS].data)
    yield b'"'


class _ArrowStream:
    """Arrays as record batches, whose bytes are those of the arrays until they are sent."""

    def __init__(self, schema: pa.Schema) -> None:
        self._schema = schema
        self._sink = _Sink()
        self._writer = pa.ipc.new_stream(self._sink, schema)
        self._index = 0

    def write(self, arrays: Sequence[np.ndarray]) -> Iterator[bytes]:
        """The bytes of some arrays; small ones share a batch, for which they are copied."""
        start = 0
        while start < len(arrays):
            end, size = start + 1, arrays[start].nbytes
            while end < len(arrays) and size + arrays[end].nbytes <= PIECE_BYTES:
                size += arrays[end].nbytes
                end += 1
            self._writer.write_batch(_batch(self._index, arrays[start:end], self._schema))
            self._index += end - start
            start = end
            yield from joined(self._drain())

    def end(self) -> bytes:
        self._writer.close()
        return b"".join(self._drain())

    def _drain(self) -> Iterator[bytes]:
        parts, self._sink.parts = self._sink.parts, []
        for part in parts:
            view = memoryview(part)
            for start in range(0, len(view), PIECE_BYTES):
                yield bytes(view[start : start + PIECE_BYTES])


class _Sink(io.RawIOBase):
    """What Arrow's writer writes to: takes its buffers as they are, without a copy."""

    def __init__(self) -> None:
        self.parts: list[Any] = []

    def writable(self) -> bool:
        return True

    def write(self, part: Any) -> int:
        self.parts.append(part)
        return len(part)


def _metadata(model: str, weights: str, num_rows: int) -> dict[str, str]:
    return {"model": model, "weights": weights, "rows": str(num_rows)}


def _batch(first: int, arrays: Sequence[np.ndarray], schema: pa.Schema) -> pa.RecordBatch:
    flat = [np.ascontiguousarray(array, np.float32).reshape(-1) for array in arrays]
    ends = np.cumsum([0, *map(len, flat)]).astype(np.int32)
    together = flat[0] if len(flat) == 1 else np.concatenate(flat)
    values = pa.ListArray.from_arrays(pa.array(ends), pa.array(together))
    shapes = pa.array([array.shape for array in arrays], pa.list_(pa.int64()))
    index = pa.array(range(first, first + len(arrays)), pa.int64())
    return pa.record_batch([index, values, shapes], schema=schema)
