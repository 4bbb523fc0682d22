"""The audit of a run: which packed rows each step trained on, and proof that each came once.

    audit/rank-00000.jsonl   {"step": 7, "attempt": 1, "rows": [[epoch, block, row, hash], …]}
    audit.json               what they come to, written at the end

A step that was redone after a restart counts by its last attempt.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from raptide.data.stream import GlobalBatch

AUDIT, SUMMARY = "audit", "audit.json"

AuditedRow = tuple[int, int, int, str]
"""Epoch, block and row in the stream, and a hash of the tokens, targets and boundaries."""


class AuditWriter:
    """Writes the rows of one rank."""

    def __init__(self, run: Path, rank: int, attempt: int) -> None:
        (run / AUDIT).mkdir(exist_ok=True)
        self._file = (run / AUDIT / f"rank-{rank:05d}.jsonl").open("a")
        self._attempt = attempt

    def write(self, step: int, batch: GlobalBatch, first: int, last: int) -> None:
        """Rows `first` to `last` (exclusive) of the batch have gone into a step."""
        rows = [
            (*batch.row_ids[index].tolist(), hash_row(batch, index)) for index in range(first, last)
        ]
        line = {"step": step, "attempt": self._attempt, "rows": rows}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def hash_row(batch: GlobalBatch, index: int) -> str:
    """Hash of a row's content, 16 hexadecimal digits."""
    rows = batch.rows
    content = (rows.tokens[index], rows.targets[index], rows.segments[index])
    return hashlib.blake2b(b"".join(a.tobytes() for a in content), digest_size=8).hexdigest()


@dataclass(frozen=True)
class Audit:
    """What a run's audit comes to."""

    steps: int
    rows: int
    digest: str
    """SHA-256 over the rows of all steps in order: equal for runs that saw the same batches."""

    attempts: int
    """How often the workers were started."""

    redone_steps: int
    """Steps that ran more than once, each counted as often as it ran in vain."""

    longest_redone: int
    """The most steps that one restart did again."""


def audited_steps(run: Path) -> dict[int, list[AuditedRow]]:
    """The rows of each step in the order of the global batch, by the last attempt at it."""
    last: dict[int, tuple[int, list[AuditedRow]]] = {}
    for line in _lines(run):
        attempt, rows = last.get(line["step"], (0, []))
        if line["attempt"] > attempt:
            attempt, rows = line["attempt"], []
        if line["attempt"] == attempt:
            last[line["step"]] = attempt, rows + [tuple(row) for row in line["rows"]]
    return {step: last[step][1] for step in sorted(last)}


def write_audit(run: Path) -> Audit:
    """Read the audit of a finished run and write its summary."""
    steps = audited_steps(run)
    digest = hashlib.sha256(json.dumps(list(steps.items())).encode()).hexdigest()
    ends: dict[int, tuple[int, int]] = {}  # first and last step of each attempt
    for line in _lines(run):
        first, end = ends.get(line["attempt"], (line["step"], 0))
        ends[line["attempt"]] = min(first, line["step"]), max(end, line["step"])
    redone = [
        max(0, ends[before][1] - ends[after][0] + 1)
        for before, after in zip(sorted(ends), sorted(ends)[1:], strict=False)
    ]
    audit = Audit(
        steps=len(steps),
        rows=sum(map(len, steps.values())),
        digest=digest,
        attempts=len(ends),
        redone_steps=sum(redone),
        longest_redone=max(redone, default=0),
    )
    (run / SUMMARY).write_text(json.dumps(asdict(audit), indent=1) + "\n")
    return audit


def _lines(run: Path) -> Iterator[dict]:
    """Every line that was written whole, rank by rank; a killed worker may leave a half one."""
    for file in sorted((run / AUDIT).glob("rank-*.jsonl")):
        by_attempt: dict[int, list[dict]] = defaultdict(list)
        for text in file.read_text().splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue
            by_attempt[line["attempt"]].append(line)
        for attempt in sorted(by_attempt):
            yield from by_attempt[attempt]
