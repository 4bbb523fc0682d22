"""Other files made of the parts: HDF5 as biotrainer reads it, CSV for scores."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv

from raptide.bulk.folder import CSV_FILE, H5_FILE, OutputFolder
from raptide.bulk.work import H5_KEY
from raptide.errors import ConfigError

EXPORT_ROWS = 1024


def refuse_no_h5py() -> None:
    """Raises ConfigError where HDF5 files cannot be written."""
    try:
        import h5py  # noqa: F401
    except ImportError:
        raise ConfigError(
            "--format h5 needs the package h5py; install it with `pip install 'raptide[h5]'`."
        ) from None


def write_h5(output: OutputFolder) -> None:
    """Every embedding as a data set of its own, under biotrainer's key, equal sequences once.

    [D] each, or [L, D] unpooled; the attribute `original_id` is the record's name.
    """
    import h5py

    with tempfile.NamedTemporaryFile(suffix=".h5") as scratch:
        # Of the newest format: only there an attribute may have more than 64 kB.
        with h5py.File(scratch.name, "w", libver="latest") as file:
            for batch in _batches(output):
                embeddings = batch["embedding"]
                keys, names = batch[H5_KEY].to_pylist(), batch["id"].to_pylist()
                for key, name, embedding in zip(keys, names, embeddings, strict=True):
                    if key not in file:
                        values = _array(embedding)
                        made = file.create_dataset(key, data=values, compression="gzip")
                        made.attrs["original_id"] = name
        _send(output, Path(scratch.name), H5_FILE)


def write_csv(output: OutputFolder) -> None:
    """The parts' columns as one CSV file, in the order of the input."""
    with tempfile.NamedTemporaryFile(suffix=".csv") as scratch:
        batches = _batches(output)
        first = next(batches)
        with pa.csv.CSVWriter(scratch.name, first.schema) as writer:
            writer.write_batch(first)
            for batch in batches:
                writer.write_batch(batch)
        _send(output, Path(scratch.name), CSV_FILE)


def _batches(output: OutputFolder) -> Iterator[pa.RecordBatch]:
    for unit in output.parts():
        part = output.read_part(unit)
        if not part.num_rows:
            yield pa.RecordBatch.from_pylist([], part.schema)
        yield from part.to_batches(EXPORT_ROWS)


def _array(embedding: Any) -> Any:
    """[D], or [L, D] of a list of vectors."""
    values = embedding.values
    if isinstance(values, pa.FixedSizeListArray):
        return values.flatten().to_numpy().reshape(len(values), -1)
    return values.to_numpy()


def _send(output: OutputFolder, scratch: Path, name: str) -> None:
    def copy(file: Any) -> None:
        with scratch.open("rb") as made:
            shutil.copyfileobj(made, file, 1 << 22)

    output.storage.write(name, copy)
