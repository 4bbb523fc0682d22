"""Blocks of corpora that lie at a URI, kept on the node that has read them.

In `blocks/` of the node's cache (`RAPTIDE_CACHE`, else ~/.cache/raptide), a file a block, up to
RAPTIDE_BLOCKS_GB (50; 0 keeps none); what was used longest ago goes first. A disk that is full
keeps less.
"""

from __future__ import annotations

import itertools
import os
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pyarrow as pa

from raptide.errors import ConfigError
from raptide.kept import cache_folder

BUDGET, DEFAULT_GB = "RAPTIDE_BLOCKS_GB", 50.0
"""Environment variable, and what holds without it."""

TRIM_EVERY = 64
"""Blocks that a process keeps between two looks at how much there is."""

_kept = itertools.count()


def kept_nearby(key: str, read: Callable[[], pa.Table]) -> pa.Table:
    """A table from the node's cache, else what `read` gives, which is kept for the next time.

    Args:
        key: a file's name, of this table and no other.

    Raises:
        ConfigError: RAPTIDE_BLOCKS_GB is no number.
    """
    budget = _budget_bytes()
    if budget == 0:
        return read()
    folder = cache_folder() / "blocks"
    file = folder / f"{key}.arrow"
    try:
        with pa.memory_map(str(file)) as source:
            table = pa.ipc.open_file(source).read_all()
        os.utime(file)
        return table
    except (OSError, pa.ArrowInvalid):  # not there, or cut off by a crash
        table = read()
    with suppress(OSError):
        _keep(folder, file, table)
        if next(_kept) % TRIM_EVERY == 0:
            trim(folder, budget)
    return table


def _keep(folder: Path, file: Path, table: pa.Table) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    partial = folder / f"{uuid.uuid4().hex}.partial"
    try:
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with (
            pa.OSFile(str(partial), "wb") as sink,
            pa.ipc.new_file(sink, table.schema, options=options) as writer,
        ):
            writer.write_table(table)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def trim(folder: Path, max_bytes: float) -> None:
    """Remove files that were used longest ago, until a tenth of `max_bytes` is free again."""
    files = []
    for file in folder.iterdir():
        with suppress(FileNotFoundError):  # another process trims, too
            status = file.stat()
            files.append((status.st_mtime, status.st_size, file))
    held = sum(size for _, size, _ in files)
    if held <= max_bytes:
        return
    for _, size, file in sorted(files):
        file.unlink(missing_ok=True)
        held -= size
        if held <= 0.9 * max_bytes:
            return


def _budget_bytes() -> float:
    asked = os.environ.get(BUDGET, str(DEFAULT_GB))
    try:
        gigabytes = float(asked)
    except ValueError:
        gigabytes = -1.0
    if not 0 <= gigabytes < float("inf"):
        raise ConfigError(
            f"{BUDGET} must be a number of gigabytes, 0 or more, but is {asked!r}; set it to what "
            "a node's disk may give, or to 0 to keep no blocks."
        )
    return gigabytes * 1e9
