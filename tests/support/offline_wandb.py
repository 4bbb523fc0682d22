"""Read W&B's offline file back: a LevelDB log of protobuf records behind a 7-byte header."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

BLOCK, HEADER = 32_768, 7
FULL, LAST = 1, 4


def records(file: Path) -> Iterator[Any]:
    """Every record of a `run-*.wandb` file."""
    data = file.read_bytes()
    assert data[:4] == b":W&B"
    position, parts = HEADER, []
    while position + HEADER <= len(data):
        if BLOCK - position % BLOCK < HEADER:  # too little room for a header: padding
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + HEADER])
        parts.append(data[position + HEADER : position + HEADER + length])
        position += HEADER + length
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(b"".join(parts))
            parts = []
            yield record


Run = tuple[str, dict[str, Any], list[dict[str, Any]], list[tuple[str, str, list[str]]]]
"""Run id, config, history, and artifacts: kind, name, what it refers to."""


def read_runs(folder: Path) -> list[Run]:
    """What each start of a run has left in its `wandb/` folder, in order."""
    return [read_file(file) for file in sorted(folder.glob("offline-run-*/run-*.wandb"))]


def read_file(file: Path) -> Run:
    run_id, config, history, artifacts = "", {}, [], []
    for record in records(file):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run_id = record.run.run_id
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        if kind == "artifact":
            refers_to = sorted(entry.ref for entry in record.artifact.manifest.contents)
            artifacts.append((record.artifact.type, record.artifact.name, refers_to))
        if kind == "history":
            row = {}
            for item in record.history.item:
                key = "/".join(item.nested_key) if item.nested_key else item.key
                row[key] = json.loads(item.value_json)
            history.append(row)
    return run_id, config, history, artifacts
