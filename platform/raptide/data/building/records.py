"""Records on their way from FASTA files to shards, as tables.

Three views of the same records, each with what one step needs:

NAMED   number, name_hash, id, cluster          to find each record's line in a cluster table
MARKED  number, content, name_hash, order,      to find copies of a sequence, and to count
        heldout, listed, length, stated, latin1,
        tagged, alone, hashes, reason
PLACED  order, heldout, cluster, id, residues,  to be written
        length

number     int64    which record of the input (`notes.first_number`)
name_hash  uint64   hash of the name
content    uint64   hash of the residues
order      uint64   hash of the cluster's name: the place in the corpus
heldout    bool     whether the cluster is held out
listed     uint64   hash of the listed held-out cluster that it is, or 0
cluster    string   the cluster's name
id         string   the record's name
residues   binary   residue ids, without specials (64-bit offsets: a bucket may exceed 2 GB)
length     int64    residues
stated     int64    members of its cluster by UniRef's own count, or 0
latin1     bool     whether its header was no UTF-8
tagged     bool     whether its header names a cluster (`clusters_of_headers`)
alone      bool     whether no table and no header puts it into a cluster
hashes     int8     longest run of # before digits at the end of its name
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

from raptide.data.building.cleaning import (
    KEPT,
    UNCLUSTERED,
    CleaningSettings,
    reasons_by_content,
    reasons_by_reading,
)
from raptide.data.fasta import FastaBatch

MMSEQS_PREFIX = r"^consensus_(.+)$"
MMSEQS_NAME = (
    r"^(?:uc|(?:cl|sp|tr|gb|ref|pdb|bbs|lcl)\||(?:pir|prf)\|\||(?:gnl|pat)\|[^|]*\|"
    r"|gi\|[^|]*\|[^|]*\|)([^|]+).*$"
)
"""What MMseqs2 takes for the name of a record whose header follows NCBI's or UniProt's form (its
Util::getFastaHeaderPosition, read 2026-11): one field, up to the next bar."""

UNIREF_PREFIX = r"^UniRef\d+_"
HASH_SIGNS = re.compile(r"(#+)\d+$")
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
    batch: FastaBatch,
    first: int,
    placing: pa.Table,
    tags: Sequence[str | None],
    cleaning: CleaningSettings,
    *,
    keep_unclustered: bool,
) -> pa.Table:
    """The records without their letters, cleaned by what each is by itself.

    Args:
        placing: columns order, heldout and listed (`place`), and alone.
        tags: what each header names as its cluster (`tagged_clusters`).
        keep_unclustered: whether records stay that are in no cluster.
    """
    flaws = reasons_by_reading(batch.flaws)
    content = reasons_by_content(np.frombuffer(batch.residues, np.uint8), batch.lengths, cleaning)
    if not keep_unclustered:
        content[placing["alone"].to_numpy() & (content == KEPT)] = UNCLUSTERED
    view = memoryview(batch.residues)
    ends = [0, *np.cumsum(batch.lengths).tolist()]
    return pa.table(
        {
            "number": _numbers(batch, first),
            "content": _hashes(view[a:b] for a, b in pairwise(ends)),
            "name_hash": name_hashes(batch.names),
            "order": placing["order"],
            "heldout": placing["heldout"],
            "listed": placing["listed"],
            "length": batch.lengths,
            "stated": stated_members(batch),
            "latin1": batch.latin1,
            "alone": placing["alone"],
            "tagged": np.array([tag is not None for tag in tags]),
            "hashes": np.fromiter(map(_hash_signs, batch.names), np.int8, len(batch.names)),
            "reason": np.where(flaws == KEPT, content, flaws),
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
    """Columns order, heldout and listed of each record, from its cluster's name.

    Args:
        listed: sorted `listed_hashes` of clusters that are held out in any case.
    """
    hashes = cluster_hashes(clusters)
    heldout = hashes[:, 1] < np.uint64(int(holdout_fraction * 2**64))
    found = np.zeros(len(heldout), np.uint64)
    if len(listed):
        plain = listed_hashes(clusters)
        found = np.where(is_listed(plain, listed), plain, found)
    return pa.table(
        {"order": hashes[:, 0].copy(), "heldout": heldout | (found != 0), "listed": found}
    )


def listed_hashes(clusters: Sequence[str]) -> np.ndarray:
    """What lists of held-out clusters are compared by: [n] uint64, of names without database.

    So `P69905` and `sp|P69905|HBA_HUMAN` are one cluster, as they are in cluster tables.
    """
    plain = plain_names(pa.array(clusters, pa.string())).to_pylist()
    return cluster_hashes(plain)[:, 1].copy()


def is_listed(hashes: np.ndarray, listed: np.ndarray) -> np.ndarray:
    """Whether each hash is in the sorted list, [n] bool; a few are sought among millions."""
    if not len(listed):
        return np.zeros(len(hashes), bool)
    places = np.searchsorted(listed, hashes)
    return listed[np.minimum(places, len(listed) - 1)] == hashes


def cluster_hashes(clusters: Sequence[str]) -> np.ndarray:
    """[n, 2] uint64 for each name: the first orders the corpus, the second decides the split."""
    return _digests((name.encode() for name in clusters), words=2, person=b"raptide.cluster")


def tagged_clusters(batch: FastaBatch, tag: str | None) -> list[str | None]:
    """The cluster that each header names as `tag=...`, [n].

    A value ends at a `;` or where the next `KEY=` begins, so that UniRef's `Tax=Homo sapiens` is
    read whole.
    """
    if tag is None:
        return [None] * len(batch.names)
    field = re.compile(rf"(?:^|[\s;]){re.escape(tag)}=([^\s;].*?)(?=\s*;|\s+[\w.-]+=|\s*$)")
    found = map(field.search, batch.descriptions)
    return [match[1] if match else None for match in found]


def _hash_signs(name: str) -> int:
    """Length of the run of # in names like `a#2`, which numbered duplicates must not meet."""
    found = HASH_SIGNS.search(name) if "#" in name else None
    return min(len(found[1]), 127) if found else 0


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
    plain = pc.replace_substring_regex(names, MMSEQS_PREFIX, r"\1")
    return pc.replace_substring_regex(plain, MMSEQS_NAME, r"\1")


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
