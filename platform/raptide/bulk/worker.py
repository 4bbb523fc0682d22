"""What Ray Data runs: tasks that read units; workers that compute them and write their parts."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from raptide.bulk.dedup import Copies, digest_of, open_part, short, write_open
from raptide.bulk.folder import REJECT_ROW, OutputFolder
from raptide.bulk.process import EngineProcess, Limits
from raptide.bulk.search import Notes, compute_surely
from raptide.bulk.units import Records, Source, Unit
from raptide.bulk.work import Rejected, Work
from raptide.patience import TRIES, unreadable

READ, DONE = "unit", "done"


class Done(NamedTuple):
    """What is said of a unit when its part is there."""

    unit: str
    residues: int
    rows: int
    rejects: int
    computed: int
    """Residues that went through the engine."""
    opening_s: float
    """Spent on opening the engine before it."""
    seconds: float


def read_units(sources: Sequence[Source], stretch: Sequence[Unit]) -> Iterator[pa.Table]:
    """The units of one source, one row a unit; read again from where the file system stumbled."""
    source = sources[stretch[0].source]
    left = list(stretch)
    for last in (*[False] * (TRIES - 1), True):
        try:
            for records in source.read(list(left)):
                yield _pack(left.pop(0), source.name, records)
            return
        except OSError as error:
            if last:
                raise unreadable(source.name, error) from None
            time.sleep(1.0)


class UnitWorker:
    """One engine's place in the cluster."""

    def __init__(
        self,
        work: Work,
        output: OutputFolder,
        stamp: str,
        limits: Limits,
        copies: Copies | None = None,
    ) -> None:
        self._work, self._output, self._stamp, self._copies = work, output, stamp, copies
        self._limits = limits
        self._engine = EngineProcess(work, limits)

    # A generator: only out of those does Ray Data let our own errors through.
    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        for row in table.to_pylist():
            unit, file, records = _unpack(row)
            done = self._compute(unit, file, records)
            yield pa.table({DONE: [json.dumps(done)]})

    def _compute(self, unit: Unit, file: str, records: Records) -> Done:
        began, opened = time.monotonic(), self._engine.opening_s
        if self._output.has_part(unit.name):  # by a worker that died before it could say so
            return Done(unit.name, unit.residues, 0, 0, 0, 0.0, 0.0)
        reasons = self._judge(records)
        sound = [index for index, reason in enumerate(reasons) if not reason]
        copies = self._copied(unit, records, sound)
        sound = [index for index in sound if index not in copies]
        items = [records.items[index] for index in sound]
        notes = Notes(self._output.storage, unit.name, self._limits.name)
        values = compute_surely(items, self._engine.compute, notes, self._work.canary)
        for index, value in zip(sound, values, strict=True):
            if isinstance(value, Rejected):
                reasons[index] = value.reason
        kept = [index for index in sound if not reasons[index]]
        rejected = [index for index, reason in enumerate(reasons) if reason]
        if rejected:  # before the part: with it the unit is done
            self._output.write_rejects(unit.name, _rejects(file, records, reasons, rejected))
        found = [value for value in values if not isinstance(value, Rejected)]
        part = self._part(records, kept, found)
        if copies:
            write_open(self._output, unit.name, open_part(part, file, records, kept, copies))
        else:
            self._output.write_part(unit.name, part, self._stamp)
        notes.forget()
        return Done(
            unit.name,
            unit.residues,
            len(kept),
            len(rejected),
            sum(records.lengths[index] for index in kept),
            self._engine.opening_s - opened,
            time.monotonic() - began,
        )

    def _judge(self, records: Records) -> list[str]:
        """Why nothing is computed of each record, or ""."""
        flaws = zip(records.ids, records.items, records.lengths, records.flaws, strict=True)
        return [flaw or self._work.flaw(name, item, size) for name, item, size, flaw in flaws]

    def _copied(self, unit: Unit, records: Records, sound: list[int]) -> dict[int, str]:
        """Records that an earlier unit computes, with the digests of their sequences."""
        if self._copies is None:
            return {}
        elsewhere = self._copies.of(unit.name)
        digests = {index: digest_of(records.items[index]) for index in sound}
        return {i: digest for i, digest in digests.items() if short(digest) in elsewhere}

    def _part(self, records: Records, kept: list[int], values: list[Any]) -> pa.Table:
        """The rows of a part, in the order of the input; a table keeps those without values."""
        if records.kept is not None:
            found = dict(zip(kept, values, strict=True))
            places = range(len(records.items))
            columns = self._work.columns(records.items, [found.get(index) for index in places])
            table = records.kept
            for name, column in columns.items():
                table = table.append_column(name, column)
            return table
        items = [records.items[index] for index in kept]
        columns = self._work.columns(items, values)
        digests = [digest_of(item) for item in items]
        return pa.table(
            {
                "id": pa.array([records.ids[index] for index in kept], pa.large_string()),
                "sequence_sha256": pa.array(digests, pa.string()),
                "length": pa.array([records.lengths[index] for index in kept], pa.int64()),
                **columns,
            }
        )

    def __del__(self) -> None:
        self._engine.close()


def _rejects(file: str, records: Records, reasons: list[str], rejected: list[int]) -> pa.Table:
    return pa.table(
        {
            "id": [records.ids[index] for index in rejected],
            "file": [file] * len(rejected),
            "line": [records.lines[index] for index in rejected],
            "reason": [reasons[index] for index in rejected],
            "length": [records.lengths[index] for index in rejected],
        },
        schema=REJECT_ROW,
    )


def _pack(unit: Unit, file: str, records: Records) -> pa.Table:
    """A unit as one row, so that Ray Data neither cuts nor joins units."""
    table = pa.table(
        {
            "id": pa.array(records.ids, pa.large_string()),
            "item": pa.array(records.items, pa.large_string()),
            "length": records.lengths,
            "line": records.lines,
            "flaw": records.flaws,
        },
    )
    return pa.table(
        {
            READ: [json.dumps(unit)],
            "file": [file],
            "records": pa.array([_bytes_of(table)], pa.large_binary()),
            "kept": pa.array([_bytes_of(records.kept)], pa.large_binary()),
        }
    )


def _unpack(row: dict[str, Any]) -> tuple[Unit, str, Records]:
    table = _table_of(row["records"])
    assert table is not None
    ids, items, lengths, lines, flaws = (
        table[name].to_pylist() for name in ("id", "item", "length", "line", "flaw")
    )
    records = Records(ids, items, lengths, lines, flaws, _table_of(row["kept"]))
    return Unit(*json.loads(row[READ])), row["file"], records


def _bytes_of(table: pa.Table | None) -> bytes:
    sink = io.BytesIO()
    if table is not None:
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    return sink.getvalue()


def _table_of(data: bytes) -> pa.Table | None:
    return pa.ipc.open_stream(data).read_all() if data else None
