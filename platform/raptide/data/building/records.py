"""Records on their way from FASTA files to shards, as tables.

Three views of the same records, each with what one step needs:

NAMED   number, name_hash, id, cluster          to find each record's line in a cluster table
MARKED  number, content, name_hash, order,      to find copies of a sequence, and to count
        heldout, length, stated, reason
PLACED  order, heldout, cluster, id, residues,  to be written
        length

number     int64    which record of the input (`notes.first_number`)
name_hash  uint64   hash of the name
content    uint64   hash of the residues
order      uint64   hash of the cluster's name: the place in the corpus
heldout    bool     whether the cluster is held out
cluster    string   the cluster's name
id         string   the record's name
residues   binary   residue ids, without specials (64-bit offsets: a bucket may exceed 2 GB)
length     int64    residues
stated     int64    members of its cluster by UniRef's own count, or 0
reason     int8     why it is dropped, an index into `cleaning.REASONS`
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raptide.data.building.cleaning import CleaningSettings, reasons_by_content
from raptide.data.fasta import FastaBatch

UNIPROT_NAME = r"^(?:sp|tr)\|([^|]+)\|.*$"
UNIREF_PREFIX = r"^UniRef\d+_"
UNIREF_SIZE = re.compile(r"(?:^| )n=(\d{1,12})(?: |$)")


def named_table(batch: FastaBatch, first: int) -> pa.Table:
    """The records' names, before their clusters are known."""
    keys = plain_names(pa.array(batch.names, pa.string()))
    return pa.table(
        {
            "number": _numbers(batch, first),
            "name_hash": name_hashes(keys),
            "id": keys,
            "cluster": pa.nulls(len(keys), pa.string()),
        }
    )


def marked_table(
    batch: FastaBatch, first: int, placing: pa.Table, cleaning: CleaningSettings
) -> pa.Table:
    """The records without their letters, cleaned by what each is by itself.

    Args:
        placing: columns order and heldout (`place`).
    """
    residues = np.frombuffer(batch.residues, np.uint8)
    view = memoryview(batch.residues)
    ends = [0, *np.cumsum(batch.lengths).tolist()]
    return pa.table(
        {
            "number": _numbers(batch, first),
            "content": _hashes(view[a:b] for a, b in pairwise(ends)),
            "name_hash": name_hashes(batch.names),
            "order": placing["order"],
            "heldout": placing["heldout"],
            "length": batch.lengths,
            "stated": stated_members(batch),
            "reason": reasons_by_content(residues, batch.lengths, cleaning),
        }
    )


def placed_table(batch: FastaBatch, clusters: pa.Array, placing: pa.Table) -> pa.Table:
    """The records with all that is written of them."""
    return pa.table(
        {
            "order": placing["order"],
            "heldout": placing["heldout"],
            "cluster": clusters,
            "id": pa.array(batch.names, pa.string()),
            "residues": _members(batch),
            "length": batch.lengths,
        }
    )


def place(clusters: Sequence[str], holdout_fraction: float, listed: np.ndarray) -> pa.Table:
    """Columns order and heldout of each record, from its cluster's name.

    Args:
        listed: second hashes of clusters that are held out in any case, uint64, sorted.
    """
    hashes = cluster_hashes(clusters)
    heldout = hashes[:, 1] < np.uint64(int(holdout_fraction * 2**64))
    heldout |= np.isin(hashes[:, 1], listed)
    return pa.table({"order": hashes[:, 0].copy(), "heldout": heldout})


def cluster_hashes(clusters: Sequence[str]) -> np.ndarray:
    """[n, 2] uint64 for each name: the first orders the corpus, the second decides the split."""
    return _digests((name.encode() for name in clusters), words=2, person=b"raptide.cluster")


def clusters_of_headers(batch: FastaBatch, tag: str | None) -> list[str]:
    """The cluster that each header names as `tag=...`, or else the record's own name.

    A value ends where the next `KEY=` begins, so that UniRef's `Tax=Homo sapiens` is read whole.
    """
    if tag is None:
        return batch.names
    field = re.compile(rf"(?:^|\s){re.escape(tag)}=(\S.*?)(?=\s+\w+=|\s*$)")
    found = map(field.search, batch.descriptions)
    return [match[1] if match else name for match, name in zip(found, batch.names, strict=True)]


def stated_members(batch: FastaBatch) -> np.ndarray:
    """What each UniRef header says of its cluster's size (`n=12`), else 0, [n] int64."""
    stated = np.zeros(len(batch.names), np.int64)
    if batch.names[0].startswith("UniRef"):
        for index, description in enumerate(batch.descriptions):
            if found := UNIREF_SIZE.search(description):
                stated[index] = int(found[1])
    return stated


def plain_names(names: pa.Array) -> pa.Array:
    """Names as MMseqs2 writes them: the accession of UniProt's `sp|P69905|HBA_HUMAN`."""
    return pc.replace_substring_regex(names, UNIPROT_NAME, r"\1")


def accessions(names: pa.Array) -> pa.Array:
    """Names without database: `P69905` of `UniRef50_P69905`, of `sp|P69905|HBA_HUMAN`."""
    return pc.replace_substring_regex(plain_names(names), UNIREF_PREFIX, "")


def name_hashes(names: Iterable[str] | pa.Array) -> np.ndarray:
    """[n] uint64."""
    plain = names.to_pylist() if isinstance(names, pa.Array) else names
    return _hashes(name.encode() for name in plain)


def _members(batch: FastaBatch) -> pa.Array:
    """Residue ids of each record, [n] large_binary, without copying."""
    offsets = np.concatenate([[0], np.cumsum(batch.lengths)])
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(batch.residues)]
    return pa.Array.from_buffers(pa.large_binary(), len(batch.names), buffers)


def _numbers(batch: FastaBatch, first: int) -> np.ndarray:
    return np.arange(first, first + len(batch.names))


def _hashes(values: Iterable[bytes | memoryview]) -> np.ndarray:
    """8 bytes each: among 250 M sequences, one wrong pair is expected in 600 corpora."""
    return _digests(values, words=1)[:, 0].copy()


def _digests(values: Iterable[bytes | memoryview], words: int, person: bytes = b"") -> np.ndarray:
    """BLAKE2b of each value, [n, words] uint64."""
    digests = (hashlib.blake2b(v, digest_size=8 * words, person=person).digest() for v in values)
    return np.frombuffer(b"".join(digests), "<u8").reshape(-1, words)
