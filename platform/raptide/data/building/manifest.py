"""The end of a build: the block table and the manifest, from the reports of the buckets."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raptide.data.building.shards import BucketReport, ShardReport
from raptide.data.corpus import (
    BLOCK_ROW,
    BLOCK_TABLE,
    FORMAT_VERSION,
    MANIFEST,
    digest_of_blocks,
)
from raptide.data.corpus_files import sha256_of_file
from raptide.small_files import write_whole

SPLITS = ("train", "heldout")


def write_manifest(folder: Path, buckets: Sequence[BucketReport], **fields: Any) -> None:
    """Write blocks.parquet and manifest.json.

    Args:
        buckets: reports in the order of the buckets.
        fields: what is known of the input: read, dropped, settings, inputs, ...
    """
    shards = [
        shard
        for split in SPLITS
        for bucket in buckets
        for shard in bucket["shards"]
        if shard["split"] == split
    ]
    blocks = [block for shard in shards for block in shard["blocks"]]
    pq.write_table(pa.Table.from_pylist(blocks, BLOCK_ROW), folder / BLOCK_TABLE)
    manifest = {
        "format_version": FORMAT_VERSION,
        "digest": digest_of_blocks(blocks),
        "alphabet": "esm-33",
        "counts": {split: _total(shards, split, "counts") for split in SPLITS},
        "length_histogram": {split: _total(shards, split, "lengths") for split in SPLITS},
        "residue_counts": {split: _total(shards, split, "residues") for split in SPLITS},
        "renamed_duplicates": sum(bucket["renamed"] for bucket in buckets),
        **fields,
        "shards": [
            {key: shard[key] for key in ("name", "split", "rows", "bytes", "sha256")}
            for shard in shards
        ],
        "blocks_sha256": sha256_of_file(folder / BLOCK_TABLE),
    }
    write_whole(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def _total(shards: Sequence[ShardReport], split: str, field: str) -> dict[str, int]:
    """Sum of one counter over the shards of a split, keys in order."""
    total: Counter[str] = Counter()
    for shard in shards:
        if shard["split"] == split:
            total.update(shard[field])  # type: ignore[literal-required]
    return dict(sorted(total.items(), key=lambda item: (len(item[0]), item[0])))
