"""The audit of a run: which packed rows each step trained on, and proof that each came once.

    audit/rank-00000.jsonl   {"step": 7, "attempt": 1, "rows": [[epoch, block, row, hash], …]}
    audit.json               what they come to, written at the end

A step that was redone after a restart counts by its last attempt.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from raptide.data.streaming.batch import PackedRows
from raptide.data.streaming.shares import BatchShare
from raptide.small_files import LinesFile, read_lines, write_whole

AUDIT, SUMMARY = "audit", "audit.json"

AuditedRow = tuple[int, int, int, str]
"""Epoch, block and row in the stream, and a hash of the tokens, targets and boundaries."""


class AuditWriter:
    """Writes the rows of one rank."""

    def __init__(self, run: Path, rank: int, attempt: int, warn: Callable[[str], Any]) -> None:
        """
        Args:
            warn: told, in a sentence, when rows begin to be lost.
        """
        with suppress(OSError):  # without the folder every line is lost, and told of
            (run / AUDIT).mkdir(exist_ok=True)
        self._lines = LinesFile(run / AUDIT / f"rank-{rank:05d}.jsonl", warn)
        self._attempt = attempt

    def write(self, step: int, share: BatchShare) -> None:
        """The rank's rows have gone into a step."""
        ids = share.row_ids.tolist()
        rows = [(*row_id, hash_row(share.rows, index)) for index, row_id in enumerate(ids)]
        self._lines.write({"step": step, "attempt": self._attempt, "rows": rows})

    def close(self) -> None:
        self._lines.close()


def hash_row(rows: PackedRows, index: int) -> str:
    """Hash of a row's content, 16 hexadecimal digits."""
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


def audited_steps(run: Path) -> Iterator[tuple[int, list[AuditedRow]]]:
    """The rows of each step in the order of the global batch, by the last attempt at it.

    For runs that have ended: each attempt goes on from a step that is no earlier than where the one
    before went on from, so the lines that count lie in order in every file.
    """
    return _rows_of_steps(run, _attempts(run))


def _rows_of_steps(
    run: Path, attempts: dict[int, set[int]]
) -> Iterator[tuple[int, list[AuditedRow]]]:
    last = {step: max(made) for step, made in attempts.items()}
    ranks = (
        (line for line in read_lines(file) if line["attempt"] == last[line["step"]])
        for file in _files(run)
    )
    merged = heapq.merge(*ranks, key=_step)  # equal steps come in the order of the ranks
    for step, lines in groupby(merged, key=_step):
        yield step, [tuple(row) for line in lines for row in line["rows"]]


def read_audit(run: Path) -> Audit:
    """What the audit of a finished run comes to."""
    attempts = _attempts(run)
    digest, rows, steps = hashlib.sha256(), 0, 0
    for step in _rows_of_steps(run, attempts):
        digest.update(json.dumps(step).encode())
        rows, steps = rows + len(step[1]), steps + 1
    ends: dict[int, tuple[int, int]] = {}  # first and last step of each attempt
    for done, made in attempts.items():
        for attempt in made:
            first, end = ends.get(attempt, (done, done))
            ends[attempt] = min(first, done), max(end, done)
    redone = [
        max(0, ends[before][1] - ends[after][0] + 1) for before, after in pairwise(sorted(ends))
    ]
    audit = Audit(
        steps=steps,
        rows=rows,
        digest=digest.hexdigest(),
        attempts=len(ends),
        redone_steps=sum(redone),
        longest_redone=max(redone, default=0),
    )
    return audit


def keep_audit(run: Path, audit: Audit) -> None:
    """Write the summary of an audit.

    Raises:
        OSError: the file system refuses.
    """
    write_whole(run / SUMMARY, json.dumps(asdict(audit), indent=1) + "\n")


def _attempts(run: Path) -> dict[int, set[int]]:
    """The attempts at each step, over all ranks."""
    attempts: dict[int, set[int]] = defaultdict(set)
    for file in _files(run):
        for line in read_lines(file):
            attempts[line["step"]].add(line["attempt"])
    return attempts


def _files(run: Path) -> list[Path]:
    return sorted((run / AUDIT).glob("rank-*.jsonl"))


def _step(line: dict[str, Any]) -> int:
    return line["step"]
