"""Records on their way from FASTA files to shards: one row each, in one shape throughout.

name_hash  uint64   where a record meets the lines of the cluster tables that name it
content    uint64   hash of the residues, where equal sequences meet
order      uint64   hash of the cluster's name: the place in the corpus
heldout    int8     1 if the cluster is held out
cluster    string   the cluster's name
id         string   the record's name
residues   binary   residue ids; empty in what is dropped
length     int64    residues, also of what is dropped
dropped    string   why it goes, or KEPT
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa

from raptide.data.cleaning import KEPT, CleaningSettings, drop, reasons_by_content
from raptide.data.fasta import FastaBatch
from raptide.data.membership import MEMBERSHIP

RECORD = pa.schema(
    [
        ("name_hash", pa.uint64()),
        ("content", pa.uint64()),
        ("order", pa.uint64()),
        ("heldout", pa.int8()),
        ("cluster", pa.string()),
        ("id", pa.string()),
        ("residues", pa.binary()),
        ("length", pa.int64()),
        ("dropped", pa.string()),
    ]
)


def records_table(batch: FastaBatch, tag: str | None, cleaning: CleaningSettings) -> pa.Table:
    """Records as the file gives them, cleaned by what each is by itself; not placed yet.

    Args:
        tag: header field that names the cluster; None makes every record its own.
    """
    names, descriptions, residues, lengths = batch
    clusters = [_cluster_of(*record, tag) for record in zip(names, descriptions, strict=True)]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(residues)]
    members = pa.Array.from_buffers(pa.binary(), len(names), buffers)
    table = _table(
        len(names),
        name_hash=_hashes(name.encode() for name in names),
        content=_hashes(member.as_buffer() for member in members),
        cluster=pa.array(clusters, pa.string()),
        id=pa.array(names, pa.string()),
        residues=members,
        length=pa.array(lengths),
        dropped=pa.array([KEPT] * len(names), pa.string()),
    )
    ids = np.frombuffer(residues, np.uint8)
    return drop(table, reasons_by_content(ids, lengths, cleaning))


def lines_as_records(lines: pa.Table) -> pa.Table:
    """Lines of a cluster table (columns cluster, id) as rows of the records' shape."""
    count = lines.num_rows
    return _table(
        count,
        name_hash=_hashes(name.encode() for name in lines["id"].to_pylist()),
        cluster=lines["cluster"],
        id=lines["id"],
        residues=pa.array([b""] * count, pa.binary()),
        dropped=pa.array([MEMBERSHIP] * count, pa.string()),
    )


def place_records(table: pa.Table, holdout_fraction: float, listed: np.ndarray) -> pa.Table:
    """Fill in `order` and `heldout` from the cluster's name.

    Args:
        listed: second hashes of clusters that are held out in any case, uint64.
    """
    hashes = cluster_hashes(table["cluster"].to_pylist())
    below = hashes[:, 1] < np.uint64(int(holdout_fraction * 2**64))
    heldout = (below | np.isin(hashes[:, 1], listed)).astype(np.int8)
    for name, values in (("order", hashes[:, 0]), ("heldout", heldout)):
        index = table.schema.get_field_index(name)
        table = table.set_column(index, name, pa.array(values))
    return table


def cluster_hashes(clusters: Sequence[str]) -> np.ndarray:
    """[n, 2] uint64 for each name: the first orders the corpus, the second decides the split."""
    return _digests((name.encode() for name in clusters), words=2, person=b"raptide.cluster")


def _cluster_of(name: str, description: str, tag: str | None) -> str:
    if tag is not None:
        for word in description.split():
            key, _, value = word.partition("=")
            if key == tag and value:
                return value
    return name


def _hashes(values: Iterable[bytes | pa.Buffer]) -> pa.Array:
    """8 bytes each: among 250 M sequences, one wrong pair is expected in 600 corpora."""
    return pa.array(_digests(values, words=1)[:, 0])


def _digests(values: Iterable[bytes | pa.Buffer], words: int, person: bytes = b"") -> np.ndarray:
    """BLAKE2b of each value, [n, words] uint64."""
    digests = (hashlib.blake2b(v, digest_size=8 * words, person=person).digest() for v in values)
    return np.frombuffer(b"".join(digests), "<u8").reshape(-1, words)


def _table(count: int, **columns: pa.Array | pa.ChunkedArray) -> pa.Table:
    """A table of RECORD; numbers that are not given are 0."""
    zeros = pa.array(np.zeros(count, np.int64))
    filled = [
        columns[field.name] if field.name in columns else zeros.cast(field.type) for field in RECORD
    ]
    return pa.table(filled, schema=RECORD)
