"""What a job writes.

embeddings/
  manifest.json      what was computed on what, and in the end how much; guards the folder
  parts/*.parquet    one a unit, in the order of the input; one data set to any tool
  rejects.parquet    the records that nothing was computed of, and why; there at the end
  rejects/           the same unit by unit, while the job goes on
  dedup/             equal sequences and who computes them, while the job goes on
  deaths/            notes on records that killed their process, while the job goes on
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from raptide.bulk.sources.pipe import INPUTS
from raptide.errors import ConfigError, RaptideError
from raptide.small_files import claim
from raptide.storage import PARTIAL, Storage, storage_of

FORMAT_VERSION = 1
MANIFEST, LOCK = "manifest.json", ".lock"
PARTS, REJECTS, DEATHS, DEDUP = "parts", "rejects", "deaths", "dedup"
REJECTS_FILE = "rejects.parquet"
H5_FILE, CSV_FILE, TABLES = "embeddings.h5", "scores.csv", "tables"
MADE = (H5_FILE, CSV_FILE, TABLES)
"""What may be made of the parts."""

STAMP = b"raptide"
"""Of what a part's metadata says: the digest of its job's fingerprint."""

REJECT_ROW = pa.schema(
    [
        ("id", pa.large_string()),
        ("file", pa.string()),
        ("line", pa.int64()),
        ("reason", pa.string()),
        ("length", pa.int64()),
    ]
)

PART = re.compile(r"\d+-[0-9a-f]{16}-\d{12}\.parquet")
BEGUN = re.compile(r"(?:manifest\.json|\.lock)\.[0-9a-f]{8}")
"""What a job that was killed at its very beginning leaves in PARTIAL."""

HEARTBEAT_S = 10.0
STALE_S = 60.0
SETTLE_S = 1.0
"""Where a file system has no locks, a job says every HEARTBEAT_S that it lives, and counts as dead
after STALE_S. Of several that begin at once, the one whose word stands after SETTLE_S goes on."""


T = TypeVar("T")


@dataclass(frozen=True)
class OutputFolder:
    """One job's output. Safe to pickle."""

    storage: Storage

    @classmethod
    def at(cls, path: str | Path) -> OutputFolder:
        """The folder at a path or a URI.

        Raises:
            ConfigError: pyarrow knows no such file system.
        """
        return cls(storage_of(path, "--output"))

    @property
    def name(self) -> str:
        return self.storage.path

    def path(self, name: str) -> str:
        """Of a file in it, as people write it."""
        return self.storage.full(name)

    def manifest(self) -> dict[str, Any] | None:
        """What the folder's job is, or None where there is none yet.

        Raises:
            ConfigError: the folder is of something else.
        """
        if not self.storage.holds(MANIFEST):
            if self._holds_other_things():
                raise self._not_ours()
            return None
        try:
            manifest = json.loads(self.storage.read(MANIFEST))
        except ValueError:
            raise self._not_ours() from None
        if not isinstance(manifest, dict) or "fingerprint" not in manifest:
            raise self._not_ours()
        return manifest

    def _holds_other_things(self) -> bool:
        names = set(self.storage.names("", folders=True)) - {LOCK, PARTIAL}
        partial = self.storage.names(PARTIAL, folders=True)
        return bool(names) or not all(map(BEGUN.fullmatch, partial))

    def _not_ours(self) -> ConfigError:
        return ConfigError(
            f"{self.name} holds files that no job of this kind wrote; choose another --output."
        )

    def write_manifest(self, manifest: dict[str, Any]) -> None:
        text = json.dumps(manifest, indent=1) + "\n"
        self.storage.write(MANIFEST, lambda file: file.write(text.encode()))

    def refuse_strangers(self, fingerprint: dict[str, Any]) -> None:
        """A folder holds one job's output, or nothing.

        Args:
            fingerprint: of the job, or the fields of it that are known already.

        Raises:
            ConfigError: it holds something else; the message names the field that differs.
        """
        manifest = self.manifest()
        if manifest is None:
            return
        there = manifest["fingerprint"]
        unknown = {"inputs"} - there.keys()  # the job ended before it had read them
        for field, value in fingerprint.items():
            if field not in unknown and there.get(field) != value:
                raise ConfigError(
                    f"{self.name} holds the output of another job ({field}: "
                    f"{_shown(there.get(field))} there, {_shown(value)} here); start over with "
                    "--replace, or choose another --output."
                )

    def refuse_other_parts(self, units: set[str]) -> None:
        """Raises ConfigError where the parts are not all of these units: readers take all."""
        for name in self.storage.names(PARTS, folders=True):
            if name.removesuffix(".parquet") not in units:
                raise ConfigError(
                    f"{self.path(PARTS)} holds {name[:80]!r}, which is no part of this job; take "
                    "it away, or choose another --output."
                )

    def clear(self) -> None:
        """Delete what a job wrote here, and nothing else; the manifest stays.

        Killed at any point, it leaves what the old job can go on with.

        Raises:
            ConfigError: others wrote there, too.
        """
        for name in self.storage.names(PARTS, folders=True):
            if not PART.fullmatch(name):
                raise ConfigError(
                    f"{self.path(PARTS)} holds {name[:80]!r}, which no job wrote, so nothing is "
                    "deleted; take it away, or choose another --output."
                )
        for name in (PARTS, REJECTS, DEATHS, DEDUP, PARTIAL, INPUTS, *MADE, REJECTS_FILE):
            self.storage.delete(name)

    def give_back(self) -> None:
        """The same, and the folder is nobody's any more."""
        self.clear()
        self.storage.delete(MANIFEST)

    def tidy(self) -> None:
        """Take away what a killed job was writing."""
        for name in (PARTIAL, INPUTS):
            self.storage.delete(name)

    def finish(self, manifest: dict[str, Any]) -> None:
        """Say that all is there; what was needed until then goes only afterwards."""
        self.write_manifest(manifest | {"finished": True})
        for name in (REJECTS, DEATHS, DEDUP):
            self.storage.delete(name)
        self.tidy()

    def parts(self) -> list[str]:
        """Units that are done."""
        return self.units_in(PARTS)

    def units_in(self, folder: str) -> list[str]:
        """Units that have a file in a folder."""
        return [name.removesuffix(".parquet") for name in self.storage.names(folder)]

    def has_part(self, unit: str) -> bool:
        return self.storage.holds(f"{PARTS}/{unit}.parquet")

    def open_part(self, unit: str) -> pq.ParquetFile:
        return self.open_table(f"{PARTS}/{unit}.parquet")

    def write_part(self, unit: str, table: pa.Table, stamp: str) -> None:
        """Write a unit's part.

        Args:
            stamp: of the job; a worker of a killed one may still be at work when another begins.
        """
        marked = table.replace_schema_metadata({STAMP: stamp})
        self._write_table(f"{PARTS}/{unit}.parquet", marked)

    def delete_part(self, unit: str) -> None:
        self.storage.delete(f"{PARTS}/{unit}.parquet")

    def rejects(self, unit: str) -> pa.Table:
        """A unit's rejects so far."""
        name = f"{REJECTS}/{unit}.parquet"
        return self.read_table(name) if self.storage.holds(name) else REJECT_ROW.empty_table()

    def write_rejects(self, unit: str, table: pa.Table) -> None:
        self._write_table(f"{REJECTS}/{unit}.parquet", table)

    def _write_table(self, name: str, table: pa.Table) -> None:
        # Numbers of models do not compress; names and digests hardly count beside them.
        self.storage.write(name, lambda file: pq.write_table(table, file, compression="lz4"))

    def gather_rejects(self) -> int:
        """All rejects in one file, in the order of the input; how many there are."""
        if (self.manifest() or {}).get("finished") and self.storage.holds(REJECTS_FILE):
            return self.open_table(REJECTS_FILE).metadata.num_rows
        units = self.storage.names(REJECTS)
        count = 0

        def write(file: Any) -> None:
            nonlocal count
            count = 0
            with pq.ParquetWriter(file, REJECT_ROW, compression="zstd") as writer:
                for name in units:
                    table = self.read_table(f"{REJECTS}/{name}")
                    writer.write_table(table)
                    count += table.num_rows

        self.storage.write(REJECTS_FILE, write)
        return count

    def open_table(self, name: str) -> pq.ParquetFile:
        """One of the folder's Parquet files, for what its footer says."""
        filesystem = self.storage.filesystem
        return self.storage.ask(name, lambda path: pq.ParquetFile(filesystem.open_input_file(path)))

    def read_in(self, name: str, read: Callable[[pq.ParquetFile], T]) -> T:
        """What is read in one of them; opened anew where the file system stumbles in between."""

        def attempt(path: str) -> T:
            with pq.ParquetFile(self.storage.filesystem.open_input_file(path)) as file:
                return read(file)

        return self.storage.ask(name, attempt)

    def read_table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """One of them as a whole."""
        return self.read_in(name, lambda file: file.read(columns))

    def read_part(self, unit: str, columns: list[str] | None = None) -> pa.Table:
        """A unit's part; as large as a unit's output may be."""
        return self.read_table(f"{PARTS}/{unit}.parquet", columns)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within the block, no other job writes here; a dead one's claim is gone.

        A folder that was not there before and holds nothing afterwards is gone, too.

        Raises:
            ConfigError: another one does.
        """
        new = not self.storage.is_there()
        with self._locked() if self.storage.is_local else self._leased():
            try:
                yield
            finally:
                self._leave(new)

    def _leave(self, new: bool) -> None:
        if not self._holds_other_things():
            for name in (LOCK, PARTIAL, *[""] * new):
                self.storage.delete(name)

    def _refuse(self, holder: str) -> ConfigError:
        return ConfigError(
            f"Another job{holder} writes to {self.name}; wait for its end, stop it, or choose "
            "another --output."
        )

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.storage.make()
        path = self.storage.full(LOCK)
        with open(path, "w") as file:
            if not claim(file):
                raise self._refuse("")
            if not os.path.exists(path) or not os.path.samestat(
                os.stat(path), os.fstat(file.fileno())
            ):
                raise self._refuse("")  # it has just ended, and taken the file away
            yield

    @contextmanager
    def _leased(self) -> Iterator[None]:
        me = f"{socket.gethostname()}, process {os.getpid()}, {uuid.uuid4().hex[:8]}"
        holder, alive = self._lease()
        if time.time() - alive < STALE_S:
            raise self._refuse(f" ({holder})")
        ended = threading.Event()

        def say() -> None:
            text = json.dumps({"who": me, "alive": time.time()}).encode()
            self.storage.write(LOCK, lambda file: file.write(text))

        def beat() -> None:
            while not ended.wait(HEARTBEAT_S):
                with suppress(RaptideError):  # the next one may get through
                    say()

        say()
        time.sleep(SETTLE_S)
        holder, _ = self._lease()
        if holder != me:
            raise self._refuse(f" ({holder})")
        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            self.storage.delete(LOCK)

    def _lease(self) -> tuple[str, float]:
        """Who holds the folder, and when that was said last, Unix time; ("", 0) for nobody."""
        if not self.storage.holds(LOCK):
            return "", 0.0
        lease = json.loads(self.storage.read(LOCK))
        return lease["who"], lease["alive"]


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
