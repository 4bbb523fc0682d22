"""A corpus on disk, or at a URI.

    corpora/x/
      manifest.json              what is in it, from what, and the digest; written last
      blocks.parquet             one row a block: split, shard, row_group, rows, residues, sha256
      train-00000-00.parquet     shards of cluster rows (zstd), at most 256 row groups each
      heldout-00000-00.parquet   the same for the clusters held out

A *cluster row* is `cluster` (string), `cluster_size` (int64), `first_member` (int64), `ids` (list
of string), `members` (list of binary, residue ids without specials) and `lengths` (list of int32).
Member 0 is the representative. A large cluster spans several rows, told apart by `first_member`.

A *block* is one row group, the unit of reading. Rows are ordered by a hash of the cluster's name,
so that reading in order is reading at random. The digest is the hash of the blocks' hashes, which
cover the logical rows; Parquet bytes are hashed per file, only to find damage.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from raptide.data.corpus_files import CorpusFiles
from raptide.data.nearby import kept_nearby
from raptide.errors import CorpusError
from raptide.patience import unreadable

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
BLOCK_TABLE = "blocks.parquet"
MAX_ROW_GROUPS = 256

LENGTH_BIN = 50
"""Residues in one bin of the manifest's length histogram."""

Split = Literal["train", "heldout"]

CLUSTER_ROW = pa.schema(
    [
        ("cluster", pa.string()),
        ("cluster_size", pa.int64()),
        ("first_member", pa.int64()),
        ("ids", pa.list_(pa.string())),
        ("members", pa.list_(pa.binary())),
        ("lengths", pa.list_(pa.int32())),
    ]
)

BLOCK_ROW = pa.schema(
    [
        ("split", pa.string()),
        ("shard", pa.string()),
        ("row_group", pa.int32()),
        ("rows", pa.int64()),
        ("residues", pa.int64()),
        ("sha256", pa.string()),
    ]
)


@dataclass(frozen=True)
class ClusterRows:
    """One block in memory: n cluster rows with m members in all."""

    clusters: pa.Array
    """Cluster names, [n] string."""

    cluster_size: np.ndarray
    """Members of the whole cluster, [n] int64."""

    first_member: np.ndarray
    """Index within the cluster of the row's first member, [n] int64."""

    member_splits: np.ndarray
    """Members of row i are member_splits[i] to member_splits[i + 1], [n + 1] int64."""

    residue_splits: np.ndarray
    """Residues of member j are residues[residue_splits[j]:residue_splits[j + 1]], [m + 1] int64."""

    residues: np.ndarray
    """Residue ids of all members, end to end, uint8."""

    @classmethod
    def from_table(cls, table: pa.Table) -> ClusterRows:
        members = table["members"].combine_chunks()
        ends, residues = _joined(members.flatten())
        member_splits = members.offsets.to_numpy().astype(np.int64)
        return cls(
            clusters=table["cluster"].combine_chunks(),
            cluster_size=table["cluster_size"].to_numpy(),
            first_member=table["first_member"].to_numpy(),
            member_splits=member_splits - member_splits[0],
            residue_splits=ends,
            residues=residues,
        )


class Blocks(Sequence[dict[str, Any]]):
    """Rows of the block table, each made when it is asked for: 95,000 dicts would take 70 MB, in
    every process that reads the corpus."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table

    def __len__(self) -> int:
        return self._table.num_rows

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, index: slice) -> Blocks: ...

    def __getitem__(self, index: int | slice) -> dict[str, Any] | Blocks:
        places = range(len(self))[index]
        if isinstance(places, range):
            assert places.step == 1, "blocks are cut in their order"
            return Blocks(self._table.slice(places.start, len(places)))
        return self._table.slice(places, 1).to_pylist()[0]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for piece in self._table.to_batches(max_chunksize=1024):
            yield from piece.to_pylist()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Blocks) and self._table.equals(other._table)

    __hash__ = None  # type: ignore[assignment]

    @property
    def residues(self) -> int:
        """Of all of them together."""
        return pc.sum(self._table["residues"]).as_py() or 0

    @property
    def nbytes(self) -> int:
        """Memory that they take."""
        return self._table.nbytes


@dataclass(frozen=True)
class Corpus:
    """An opened corpus: its manifest and its block table; residues are read block by block."""

    files: CorpusFiles
    manifest: dict[str, Any]

    @classmethod
    def open(cls, where: str | Path) -> Corpus:
        """Open a corpus folder, or one at a URI.

        Raises:
            ConfigError: pyarrow knows no file system of that URI.
            CorpusError: there is no finished corpus, or it has another format version.
            RaptideError: the file system does not give it out.
        """
        files = CorpusFiles.at(where)
        where, file = files.where, files.name(MANIFEST)
        try:
            manifest = json.loads(files.content(MANIFEST))
        except (FileNotFoundError, NotADirectoryError):
            raise CorpusError(
                f"{where} holds no finished corpus (no {MANIFEST}); build one with "
                f"`python jobs/build_corpus.py --input FASTA --output {where}`."
            ) from None
        except OSError as error:
            raise unreadable(file, error) from None
        except ValueError as error:
            raise CorpusError(f"{file} is damaged ({error}); build again.") from None
        version = manifest.get("format_version")
        if version != FORMAT_VERSION:
            raise CorpusError(
                f"{where} has corpus format {version}, but this version reads {FORMAT_VERSION}; "
                "build the corpus again."
            )
        return cls(files, manifest)

    @property
    def where(self) -> str:
        """Its path as it was given, or its URI."""
        return self.files.where

    @property
    def everywhere(self) -> str:
        """The same from any working directory."""
        return self.where if self.files.is_far else str(self.path.resolve())

    @property
    def path(self) -> Path:
        """The folder of a corpus on this machine's file systems."""
        assert not self.files.is_far, f"{self.where} is no path"
        return Path(self.where)

    @property
    def digest(self) -> str:
        return self.manifest["digest"]

    @cached_property
    def _blocks(self) -> pa.Table:
        return self._block_table([name for name in BLOCK_ROW.names if name != "sha256"])

    def _block_table(self, columns: list[str]) -> pa.Table:
        return self.files.parquet(BLOCK_TABLE, lambda file: file.read(columns))

    def blocks(self, split: Split) -> Blocks:
        """The block table's rows of one split, in corpus order, without their hashes."""
        table = self._blocks
        return Blocks(table.filter(pc.equal(table["split"], split)))

    def read_block(self, block: dict[str, Any]) -> ClusterRows:
        """Read one block, given its row of the block table.

        Raises:
            CorpusError: the shard is missing or damaged.
            RaptideError: the file system does not give it out.
        """
        columns = ["cluster", "cluster_size", "first_member", "members"]
        return ClusterRows.from_table(self.read_columns(block, columns))

    def read_columns(self, block: dict[str, Any], columns: list[str]) -> pa.Table:
        """Some columns of one block's cluster rows.

        Raises:
            CorpusError: the shard is missing or damaged.
            RaptideError: the file system does not give it out.
        """
        shard, group = block["shard"], block["row_group"]

        def read() -> pa.Table:
            return self.files.parquet(
                shard, lambda file: file.read_row_group(group, columns), f", row group {group}"
            )

        if not self.files.is_far:
            return read()
        return kept_nearby(f"{self.digest[:32]}-{shard}-{group}-{'-'.join(columns)}", read)

    def verify(self) -> None:
        """Compare the hash of every file with the manifest's, several files at once, and the digest
        with that of the blocks.

        Raises:
            CorpusError: names the first file that is missing or has another hash.
            RaptideError: names the first that the file system does not give out.
        """
        names, expected = zip(*self._files(), strict=True)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            found_all = pool.map(self.files.sha256, names)
            hashes = tqdm(found_all, "verifying", len(names), disable=None)
            try:
                for name, hoped, found in zip(names, expected, hashes, strict=True):
                    if found != hoped:
                        raise CorpusError(
                            f"{self.files.name(name)} is damaged: expected sha256 {hoped}, found "
                            f"{found}; build again."
                        )
            finally:
                pool.shutdown(cancel_futures=True)

        found = digest_of_blocks(Blocks(self._block_table(["split", "sha256"])))
        if found != self.digest:
            raise CorpusError(
                f"{self.files.name(MANIFEST)} is damaged: it says digest {self.digest}, but the "
                f"blocks have {found}; build again."
            )

    def _files(self) -> Iterator[tuple[str, str]]:
        for shard in self.manifest["shards"]:
            yield shard["name"], shard["sha256"]
        yield BLOCK_TABLE, self.manifest["blocks_sha256"]


def digest_of_blocks(blocks: Iterable[dict[str, Any]]) -> str:
    """The corpus digest, from the block table's rows in order."""
    digest = hashlib.sha256(f"raptide corpus {FORMAT_VERSION}\n".encode())
    for block in blocks:
        digest.update(f"{block['split']} {block['sha256']}\n".encode())
    return digest.hexdigest()


def hash_rows(table: pa.Table) -> str:
    """SHA-256 over the logical content of cluster rows, however Arrow has chunked them."""
    digest = hashlib.sha256()
    for name in ("cluster_size", "first_member"):
        digest.update(table[name].to_numpy().astype("<i8").tobytes())
    for name in ("ids", "members"):
        column = table[name].combine_chunks()
        digest.update(np.diff(column.offsets.to_numpy()).astype("<i8").tobytes())
        _hash_strings(digest, column.flatten())
    _hash_strings(digest, table["cluster"].combine_chunks())
    return digest.hexdigest()


def _hash_strings(digest: Any, strings: pa.Array) -> None:
    ends, data = _joined(strings)
    digest.update(np.diff(ends).astype("<i8").tobytes())
    digest.update(data)


def member_residues(members: pa.Array) -> np.ndarray:
    """Residue ids of some members, end to end, uint8."""
    return _joined(members)[1]


def _joined(strings: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Strings end to end: where each begins and the end, [n + 1] int64, and the bytes, uint8."""
    offsets = np.frombuffer(strings.buffers()[1], np.int32)[strings.offset :][: len(strings) + 1]
    data = strings.buffers()[2]
    joined = np.frombuffer(data, np.uint8) if data else np.empty(0, np.uint8)
    return offsets.astype(np.int64) - offsets[0], joined[offsets[0] : offsets[-1]]
