"""The table of a study: study.parquet, a row a model or n-gram."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raptide.evaluation.cache import Measured
from raptide.scaling.measuring import Point
from raptide.storage import Storage

TABLE = "study.parquet"

COLUMNS: dict[str, Any] = {
    "name": str,
    "kind": str,
    "model": str,
    "data": str,
    "seed": int,
    "family": str,
    "layers": int,
    "width": int,
    "parameters": int,
    "corpus": str,
    "sampling": str,
    "fraction": float,
    "epoch_tokens": float,
    "steps": int,
    "tokens": int,
    "epochs": float,
    "flops": float,
    "tokens_per_s": float,
    "run_ece": float,
    "run_ece_masked": float,
    "weights": str,
    "checkpoint": str,
}
"""`kind` is transformer, lstm or n-gram. `epochs` is how often the data were seen; `flops` are
those of the training; `run_ece` is what the run itself found at its last step, on crops. What
follows is measured on the same whole proteins for all: `ece` of all chosen residues and
`ece_masked` of those shown as `<mask>`, each with `_low` and `_high`, and so the main metrics of
the benchmark."""

_TYPES = {str: pa.string(), int: pa.int64(), float: pa.float64()}


def row_of(point: Point) -> dict[str, Any]:
    """All that is known of a point."""
    row: dict[str, Any] = {name: point.facts.get(name) for name in COLUMNS}
    if row["tokens"] and row["epoch_tokens"]:
        row["epochs"] = row["tokens"] / row["epoch_tokens"]
    measured = {"ece": point.ece, "ece_masked": point.ece_masked, **point.bench}
    for name, each in measured.items():
        row |= _numbers(name, each)
    return row


def _numbers(name: str, each: Measured | None) -> dict[str, float | None]:
    if each is None:
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"))
    return {name: each.value, f"{name}_low": each.low, f"{name}_high": each.high}


def write_table(folder: Path, points: Sequence[Point]) -> Path:
    """Write the table, whole or not at all."""
    rows = [row_of(point) for point in points]
    names = dict.fromkeys(name for row in rows for name in row)
    schema = pa.schema([(name, _TYPES[COLUMNS.get(name, float)]) for name in names])
    whole = [{name: row.get(name) for name in names} for row in rows]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(whole, schema), buffer, compression="zstd")
    Storage.of(folder).write(TABLE, lambda file: file.write(buffer.getvalue()))
    return folder / TABLE
