"""Standard input and pipes: read once, into the output folder, and from there like any file."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from raptide.bulk.sources.fasta import FastaFile
from raptide.bulk.units import Records, Sizes, Survey, Unit
from raptide.data.compressed import READ_BYTES, STANDARD_INPUT
from raptide.data.fasta import ReadingRules
from raptide.errors import RaptideError
from raptide.patience import reason_of
from raptide.storage import Storage

INPUTS = "inputs"
"""Folder of the copies, while a job goes on. The same bytes given again are the same units."""


@dataclass(frozen=True)
class Pipe:
    """What can be read only once; a source when it is copied."""

    given: str
    rules: ReadingRules

    @property
    def name(self) -> str:
        return "standard input" if self.given == STANDARD_INPUT else self.given

    def copied(self, storage: Storage, index: int) -> FastaFile:
        """Copy it to a job's output folder."""
        file = f"{INPUTS}/{index:05d}"
        raw = io.FileIO(0, closefd=False) if self.given == STANDARD_INPUT else io.FileIO(self.given)
        try:
            storage.filesystem.create_dir(storage.full(INPUTS), recursive=True)
            with raw, storage.filesystem.open_output_stream(storage.full(file)) as copy:
                while chunk := raw.read(READ_BYTES):
                    copy.write(chunk)
        except OSError as error:
            raise RaptideError(
                f"{self.name} cannot be copied to {storage.full(file)} ({reason_of(error)}); make "
                "room, or write it to a file first."
            ) from None
        return FastaFile(storage, file, self.rules, self.name)

    def survey(self, index: int, sizes: Sizes) -> Survey:
        raise AssertionError("not copied")

    def stretches(self, units: list[Unit]) -> Iterator[list[Unit]]:
        raise AssertionError("not copied")

    def read(self, units: Sequence[Unit]) -> Iterator[Records]:
        raise AssertionError("not copied")
