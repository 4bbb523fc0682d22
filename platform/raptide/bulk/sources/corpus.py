"""Records of a corpus of ours, one split of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from raptide.alphabet import decode_sequences
from raptide.bulk.sources.tables import units_of_rows
from raptide.bulk.units import Records, Sizes, Survey, Unit, short_stretches
from raptide.data.corpus import Corpus, Split, member_residues

Members = Literal["representatives", "all"]


@dataclass(frozen=True)
class CorpusSplit:
    """The representatives, or all members, of one split's clusters, in corpus order."""

    path: Path
    split: Split
    sampling: Members

    @property
    def name(self) -> str:
        return str(self.path)

    def survey(self, index: int, sizes: Sizes) -> Survey:
        corpus = Corpus.open(self.path)
        asked = f"{corpus.digest} {self.split} {self.sampling}\n"
        digest = hashlib.sha256(asked.encode()).hexdigest()
        before = [0]
        """Records before each block."""

        def lengths() -> Iterator[np.ndarray]:
            for block in corpus.blocks(self.split):
                found = self._pick(self._table(corpus, block, ["lengths"]), "lengths")
                before.append(before[-1] + len(found))
                yield found.to_numpy()

        units = units_of_rows(index, digest, sizes, lengths())
        places = np.searchsorted(before, [unit.first for unit in units], side="right") - 1
        blocks = zip(units, places.tolist(), strict=True)
        return Survey(digest, [u._replace(start=b, stop=before[b], line=0) for u, b in blocks])

    def stretches(self, units: list[Unit]) -> Iterator[list[Unit]]:
        return short_stretches(units)

    def read(self, units: Sequence[Unit]) -> Iterator[Records]:
        corpus = Corpus.open(self.path)
        blocks: Iterator[dict[str, Any]] = iter([])
        ids: list[str] = []
        sequences: list[str] = []
        first = 0
        for unit in units:
            if unit.stop >= first + len(ids):  # what lies between is not asked for
                blocks = iter(corpus.blocks(self.split)[unit.start :])
                ids, sequences, first = [], [], unit.stop
            while first + len(ids) < unit.first + unit.records:
                table = self._table(corpus, next(blocks), ["ids", "members", "lengths"])
                lengths = self._pick(table, "lengths").to_numpy()
                ids += self._pick(table, "ids").to_pylist()
                residues = member_residues(self._pick(table, "members"))
                sequences += decode_sequences(residues, lengths)
            skipped, stop = unit.first - first, unit.first + unit.records - first
            some = sequences[skipped:stop]
            sizes = list(map(len, some))
            yield Records(ids[skipped:stop], some, sizes, [0] * len(some), [""] * len(some))
            ids, sequences, first = ids[stop:], sequences[stop:], first + stop

    def _table(self, corpus: Corpus, block: dict[str, Any], columns: list[str]) -> pa.Table:
        return corpus.read_columns(block, ["first_member", *columns])

    def _pick(self, table: pa.Table, column: str) -> pa.Array:
        """What a column of lists holds of the members asked for."""
        lists = table[column].combine_chunks()
        if self.sampling == "all":
            return lists.flatten()
        firsts = np.flatnonzero(table["first_member"].to_numpy() == 0)
        places = lists.offsets.to_numpy()[firsts] - lists.offsets[0].as_py()
        return lists.flatten().take(pa.array(places))
