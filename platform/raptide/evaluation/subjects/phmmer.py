"""phmmer as a baseline: how well sequences align with each other, by HMMER through pyhmmer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from raptide.errors import InputError
from raptide.evaluation.requests import Kind, Request
from raptide.evaluation.subjects.subject import Ask

MAX_E_VALUE = 1000.0
"""Far above what phmmer reports by itself (10): weak hits count in a ranking."""

ENTRY = np.dtype([("sequence", "<i4"), ("score", "<f4")])


class Phmmer:
    """Every sequence searched against all: the bit score of each that phmmer finds."""

    name = "phmmer"
    baseline = True
    layers = 0
    kinds: frozenset[Kind] = frozenset({"hits"})

    def __init__(self, sequences: Sequence[str]) -> None:
        """Search among `sequences`, all different, in the order in which they are asked."""
        self._sequences = sequences
        version = f"phmmer by pyhmmer {pyhmmer_version()}, E {MAX_E_VALUE:g}, version 1"
        whole = hashlib.sha256(version.encode())
        for sequence in sequences:
            whole.update(sequence.encode() + b"\n")
        self.digest = whole.hexdigest()

    @contextmanager
    def read(self, ask: Ask) -> Iterator[PhmmerReadings]:
        """Search with what is asked, on all cores. Hits lie in a temporary file of 8 bytes each.

        Raises:
            InputError: hits are asked of a sequence that is not searched among.
        """
        places = {sequence: place for place, sequence in enumerate(self._sequences)}
        wanted: dict[str, None] = {}
        for request in ask():
            if request.reading.kind == "hits":
                if request.sequence not in places:
                    raise InputError(
                        "phmmer searches among the sequences of its task, but was asked of "
                        f"{request.sequence[:20]}..., which is none; leave it out."
                    )
                wanted[request.sequence] = None
        with TemporaryDirectory(prefix="raptide-phmmer-") as folder:
            file = Path(folder) / "hits"
            ends = _search(self._sequences, [places[sequence] for sequence in wanted], file)
            found = np.memmap(file, ENTRY, "r") if ends[-1] else np.empty(0, ENTRY)
            order = {sequence: i for i, sequence in enumerate(wanted)}
            yield PhmmerReadings(found, ends, order, len(self._sequences))


class PhmmerReadings:
    """Hits as they were found."""

    def __init__(
        self, found: np.ndarray, ends: np.ndarray, order: dict[str, int], number: int
    ) -> None:
        self._found = found
        self._ends = ends
        self._order = order
        self._number = number

    def get(self, request: Request) -> np.ndarray:
        query = self._order[request.sequence]
        entries = self._found[self._ends[query] : self._ends[query + 1]]
        scores = np.full(self._number, -np.inf, np.float32)
        scores[entries["sequence"]] = entries["score"]
        return scores


def pyhmmer_version() -> str:
    """Of the package, "" if it is not installed."""
    if find_spec("pyhmmer") is None:
        return ""
    import pyhmmer

    return str(pyhmmer.__version__)


def _search(sequences: Sequence[str], queries: list[int], file: Path) -> np.ndarray:
    """Write the hits of some sequences among all, query by query; where those of each end, [q + 1]
    int64 with a 0 before."""
    import pyhmmer

    alphabet = pyhmmer.easel.Alphabet.amino()
    digital = pyhmmer.easel.DigitalSequenceBlock(
        alphabet,
        [
            pyhmmer.easel.TextSequence(name=str(place).encode(), sequence=sequence).digitize(
                alphabet
            )
            for place, sequence in enumerate(sequences)
        ],
    )
    asked = (digital[place] for place in queries)
    ends = [0]
    with file.open("wb") as out:
        for hits in pyhmmer.hmmer.phmmer(asked, digital, E=MAX_E_VALUE):
            entries = np.array([(int(hit.name), hit.score) for hit in hits], ENTRY)
            out.write(entries.tobytes())
            ends.append(ends[-1] + len(entries))
    return np.array(ends, np.int64)
