"""Protein chains of known structure, out of a Parquet or a CSV file.

    id            text
    sequence      text, read as everywhere (`alphabet.py`)
    ss8           text as long as the sequence: H G I E B T S, C for coil, - for what does not count
    cb_angstrom   flat list of 3 L numbers: Cβ (glycine: Cα) of residue 0, of residue 1, …; NaN
                  where unresolved. In CSV numbers with blanks or commas between, with or without []

A file is read and checked once. What it holds then lies in a nameless file in the folder for
temporary files, about 14 bytes a residue; a chain takes 40 bytes of memory.
"""

from __future__ import annotations

import hashlib
import mmap
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from raptide.alphabet import decode_residues, encode_residues
from raptide.errors import InputError, SequenceError
from raptide.evaluation.metrics.structure import STATES, UNCOUNTED

Label = Literal["ss8", "cb_angstrom"]

VALIDATION_EACH = 10
"""One chain in so many is held for validation."""

BATCH_ROWS = 64
BLOCK_BYTES = 16 << 20
"""Of a CSV file, read at once; no row may be longer."""

DELIMITERS = {".csv": ",", ".tsv": "\t"}
KINDS = ".parquet, .csv or .tsv, the latter two also as .gz, .bz2 or .zst"


class Chain(NamedTuple):
    """One row."""

    id: str
    sequence: str
    ss8: str
    """"" if it was not asked for."""
    cb_angstrom: np.ndarray
    """[L, 3] fp32; [0, 3] if it was not asked for."""


def sequence_hash(sequence: str) -> int:
    """64 bits that stand for a sequence."""
    return int.from_bytes(hashlib.blake2b(sequence.encode(), digest_size=8).digest(), "big")


class Chains(Sequence[Chain]):
    """The chains of one file, in its order.

    Args:
        path: the file.
        labels: columns besides `id` and `sequence` that are needed.

    Raises:
        InputError: the file cannot be read, lacks a column, or one of its rows is wrong.
    """

    def __init__(self, path: str | Path, labels: Sequence[Label]) -> None:
        self.path, self.labels = Path(path), tuple(labels)
        lengths, ends, hashes = [], [0], []
        with tempfile.TemporaryFile() as file:
            for row, values in enumerate(_rows(self.path, ("id", "sequence", *labels)), 1):
                try:
                    chain = _checked(values)
                except InputError as error:
                    raise InputError(f"{path}, row {row}: {error}") from None
                ends.append(ends[-1] + file.write(_packed(chain)))
                lengths.append(len(chain.sequence))
                hashes.append(sequence_hash(chain.sequence))
            if not lengths:
                raise InputError(f"{path} holds no chain; give a file with at least one row.")
            file.flush()
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._ends = np.array(ends, np.int64)
        self.lengths = np.array(lengths, np.int64)
        """[n] int64."""
        self.hashes = np.array(hashes, np.uint64)
        """Of the sequences, [n] uint64."""

    def draw(self, among: np.ndarray, most: int | None) -> np.ndarray:
        """At most so many of some chains, those whose sequences' hashes are least.

        Args:
            among: places of chains, [n] int64.
        """
        order = among[np.argsort(self.hashes[among], kind="stable")]
        return np.sort(order[:most])

    def cut(self, among: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Chains to train on, and a validation share: those whose sequences' hashes are highest.

        Equal sequences come to the same side. Both are places, as `among`; where there is only one
        sequence, nothing is left to train on.
        """
        if not len(among):
            return among, among
        hashes = self.hashes[among]
        share = -(-len(among) // VALIDATION_EACH)
        held = hashes >= np.partition(hashes, -share)[-share]
        return among[~held], among[held]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        data = self._bytes[self._ends[index] : self._ends[index + 1]]
        length = int(self.lengths[index])
        coordinates = np.frombuffer(data, np.float32, 3 * length * ("cb_angstrom" in self.labels))
        rest = data[coordinates.nbytes :].decode()
        sequence, rest = rest[:length], rest[length:]
        states = length * ("ss8" in self.labels)
        return Chain(rest[states:], sequence, rest[:states], coordinates.reshape(-1, 3))


def _packed(chain: Chain) -> bytes:
    text = chain.sequence + chain.ss8 + chain.id
    return chain.cb_angstrom.tobytes() + text.encode()


def _rows(path: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The columns of each row: texts, and whatever stands for coordinates."""
    try:
        for batch in _batches(path, columns):
            taken = [batch.column(name) for name in columns]
            for row in range(batch.num_rows):
                yield {name: each[row] for name, each in zip(columns, taken, strict=True)}
    except (OSError, pa.ArrowException) as error:
        reason = str(error).split("\n")[0].rstrip(".")
        raise InputError(
            f"{path} cannot be read as a table of chains: {reason}; give {KINDS}."
        ) from None


def _batches(path: Path, columns: Sequence[str]) -> Iterable[pa.RecordBatch]:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    delimiter = next((DELIMITERS[each] for each in suffixes[-2:] if each in DELIMITERS), None)
    if delimiter is None:
        file = pq.ParquetFile(path)
        _find_columns(path, columns, file.schema_arrow.names)
        return file.iter_batches(BATCH_ROWS, columns=list(columns))
    reader = pa_csv.open_csv(
        path,
        read_options=pa_csv.ReadOptions(block_size=BLOCK_BYTES),
        parse_options=pa_csv.ParseOptions(delimiter=delimiter),
        convert_options=pa_csv.ConvertOptions(column_types=dict.fromkeys(columns, pa.string())),
    )
    _find_columns(path, columns, reader.schema.names)
    return reader


def _find_columns(path: Path, needed: Sequence[str], found: Sequence[str]) -> None:
    for name in needed:
        if name not in found:
            raise InputError(
                f"{path} needs a column `{name}`, but has {', '.join(found) or 'none'}; "
                f"rename or add it."
            )
        if found.count(name) > 1:
            raise InputError(
                f"{path} has more than one column `{name}`; columns have names of their own."
            )


def _checked(values: dict[str, pa.Scalar]) -> Chain:
    """A row as a chain.

    Raises:
        InputError: a sentence that names neither file nor row.
    """
    sequence = _sequence(values["sequence"].as_py())
    length = len(sequence)
    ss8, coordinates = "", np.zeros((0, 3), np.float32)
    if "ss8" in values:
        ss8 = _states(values["ss8"].as_py(), length)
    if "cb_angstrom" in values:
        coordinates = _coordinates(values["cb_angstrom"], length)
    return Chain(str(values["id"].as_py()), sequence, ss8, coordinates)


def _sequence(text: Any) -> str:
    if not isinstance(text, str):
        raise InputError(f"`sequence` must be text, not {text!r}; write the chain's letters.")
    try:
        return decode_residues(encode_residues(text))
    except SequenceError as error:
        raise InputError(str(error)) from None


def _states(text: Any, length: int) -> str:
    if not isinstance(text, str) or len(text) != length:
        found = f"has {len(text)}" if isinstance(text, str) else f"is {text!r}"
        raise InputError(
            f"`ss8` needs a letter for each of the sequence's {length} residues, but {found}; "
            f"write {UNCOUNTED} where a state is not known."
        )
    for place, state in enumerate(text, 1):
        if state not in STATES + UNCOUNTED:
            raise InputError(
                f"`ss8` holds {state!r} at residue {place}, but its letters are "
                f"{' '.join(STATES)} and {UNCOUNTED}; write C for coil."
            )
    return text


def _coordinates(value: pa.Scalar, length: int) -> np.ndarray:
    try:
        if isinstance(value, pa.StringScalar):
            words = value.as_py().strip(" []").replace(",", " ").split()
            flat = np.array(words, np.float32)
        else:
            flat = value.values.to_numpy(zero_copy_only=False).astype(np.float32)
    except (AttributeError, TypeError, ValueError):
        raise InputError(
            f"`cb_angstrom` must be a flat list of numbers, not {str(value)[:40]!r}; "
            "write x, y, z of residue after residue, NaN where unresolved."
        ) from None
    if flat.shape != (3 * length,):
        raise InputError(
            f"`cb_angstrom` needs 3 numbers for each of the sequence's {length} residues, "
            f"{3 * length} in all, but has {len(flat)}; write NaN where unresolved."
        )
    return flat.reshape(length, 3)
