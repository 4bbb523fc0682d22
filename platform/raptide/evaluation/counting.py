"""n-grams counted by Ray Data: a task a stretch of the text, tables added up by the driver.

A worker that runs a task imports the module of its function, so this one stays free of torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import ray

from raptide.cluster import local_cpus, ray_session
from raptide.data.corpus import Corpus, Split
from raptide.data.corpus_files import sha256_of_file
from raptide.data.fasta import SOUND, ReadingRules, read_fasta
from raptide.data.fasta_text import FastaPart, split_fasta
from raptide.data.streaming.batch import StreamSettings
from raptide.data.streaming.rows import Sampling, draw_members
from raptide.data.streaming.stream import Source, share_of_blocks
from raptide.errors import InputError, plain_errors
from raptide.evaluation.ngrams import FORMAT_VERSION, SHAPE, NgramCounts, count_grams

MOST_TASKS = 256

TABLE_RESIDUES = 1 << 24
"""Residues after which a task hands out what it has counted, so that progress can be seen."""


class Proteins(NamedTuple):
    """Some proteins, end to end."""

    residues: np.ndarray
    """uint8 ids."""
    lengths: np.ndarray
    """[n] int64."""

    @classmethod
    def picked(cls, residues: np.ndarray, lengths: np.ndarray, chosen: np.ndarray) -> Proteins:
        """Those of some proteins that are chosen, [n] bool."""
        return cls(residues[np.repeat(chosen, lengths)], lengths[chosen])


class Text(Protocol):
    """Proteins that are read in stretches; small, so that it travels to every task."""

    @property
    def source(self) -> dict[str, Any]:
        """All that the counts depend on, for JSON."""

    @property
    def stretches(self) -> int:
        """How many parts it can be read in."""

    def read(self, stretches: Sequence[int]) -> Iterator[Proteins]:
        """Read some of them; flawed records are left out."""


@dataclass(frozen=True)
class CorpusText:
    """One side of a corpus under a sampling; `members` are those that epoch 0 draws."""

    corpus: Source
    split: Split
    sampling: Sampling
    stretches: int
    fraction: float = 1.0
    """Share of the blocks that are read, the first ones, as training takes them."""

    @classmethod
    def of(
        cls, corpus: Corpus, split: Split, sampling: Sampling, fraction: float = 1.0
    ) -> CorpusText:
        source = Source(corpus.everywhere, corpus.digest)
        blocks = share_of_blocks(len(corpus.blocks(split)), fraction)
        return cls(source, split, sampling, blocks, fraction)

    @property
    def source(self) -> dict[str, Any]:
        whole = {"corpus": self.corpus.digest, "split": self.split, "sampling": self.sampling}
        return whole if self.fraction == 1.0 else whole | {"fraction": self.fraction}

    def read(self, stretches: Sequence[int]) -> Iterator[Proteins]:
        corpus = self.corpus.open()
        blocks = corpus.blocks(self.split)
        for index in stretches:
            block = corpus.read_block(blocks[index])
            lengths = np.diff(block.residue_splits)
            chosen = np.zeros(len(lengths), bool)
            chosen[draw_members(block, self.sampling, StreamSettings().seed, 0)] = True
            yield Proteins.picked(block.residues, lengths, chosen)


@dataclass(frozen=True)
class FastaText:
    """The records of FASTA files."""

    parts: tuple[FastaPart, ...]
    rules: ReadingRules
    digests: tuple[str, ...]
    """SHA-256 of each file, sorted."""

    @classmethod
    def of(cls, files: Sequence[Path], rules: ReadingRules) -> FastaText:
        parts = tuple(part for file in files for part in split_fasta(file))
        return cls(parts, rules, tuple(sorted(map(sha256_of_file, files))))

    @property
    def source(self) -> dict[str, Any]:
        return {"files": list(self.digests), "rules": self.rules.model_dump()}

    @property
    def stretches(self) -> int:
        return len(self.parts)

    def read(self, stretches: Sequence[int]) -> Iterator[Proteins]:
        for index in stretches:
            for batch in read_fasta(self.parts[index], rules=self.rules):
                residues = np.frombuffer(batch.residues, np.uint8)
                yield Proteins.picked(residues, batch.lengths, batch.flaws == SOUND)


def count_ngrams(text: Text, tell: Callable[[int], object] = lambda residues: None) -> NgramCounts:
    """Count all n-grams of a text. Ray must be running.

    Args:
        tell: called with the number of residues that have been counted since.

    Raises:
        InputError: there is nothing to count, or a file cannot be read.
    """

    # A generator: only out of those does Ray Data let our own errors through.
    def count(rows: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        yield from _tables(text.read(rows["id"].tolist()))

    tasks = min(text.stretches, MOST_TASKS)
    if not tasks:
        raise InputError(
            "n-grams need proteins to be counted on, but the training side holds none; give more."
        )
    rows = ray.data.range(text.stretches, override_num_blocks=tasks)
    table = np.zeros(SHAPE, np.int64)
    proteins = residues = 0
    with plain_errors():
        for batch in rows.map_batches(count, batch_size=None).iter_batches(batch_size=None):
            table += batch["counts"].sum(0).reshape(SHAPE)
            proteins += int(batch["proteins"].sum())
            residues += int(batch["residues"].sum())
            tell(int(batch["residues"].sum()))
    return NgramCounts(table, {"source": text.source, "proteins": proteins, "residues": residues})


def _tables(some: Iterator[Proteins]) -> Iterator[dict[str, np.ndarray]]:
    """Tables of what was read, a row each time that enough has been."""
    table, proteins, residues = np.zeros(SHAPE, np.int64), 0, 0
    for each in some:
        table += count_grams(each.residues, each.lengths)
        proteins += len(each.lengths)
        residues += len(each.residues)
        if residues >= TABLE_RESIDUES:
            yield _row(table, proteins, residues)
            table, proteins, residues = np.zeros(SHAPE, np.int64), 0, 0
    yield _row(table, proteins, residues)


def _row(table: np.ndarray, proteins: int, residues: int) -> dict[str, np.ndarray]:
    return {
        "counts": table.reshape(1, -1),
        "proteins": np.array([proteins]),
        "residues": np.array([residues]),
    }


@dataclass(frozen=True)
class KeptCounts:
    """Counts of a text that are made when they are asked for, and kept in a folder."""

    text: Text
    folder: Path

    @cached_property
    def digest(self) -> str:
        """Hex digits that stand for the counts, before there are any."""
        asked = json.dumps([FORMAT_VERSION, self.text.source], sort_keys=True)
        return hashlib.sha256(asked.encode()).hexdigest()

    def get(self) -> NgramCounts:
        """Read them, or count and keep them."""
        file = self.folder / f"ngrams-{self.digest[:32]}.safetensors"
        try:
            return NgramCounts.load(file)
        except InputError:  # not there yet, or damaged
            with ray_session(num_cpus=local_cpus()):
                counts = count_ngrams(self.text)
            counts.save(file)
            return counts
