"""Remote homology: whether proteins of one fold lie together, though their sequences differ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from pydantic import Field

from raptide.errors import InputError
from raptide.evaluation.datasets.domains import Domains, read_domains
from raptide.evaluation.metrics.homology import (
    Blocks,
    Found,
    Level,
    chance,
    control,
    cosines,
    level_of,
    search,
)
from raptide.evaluation.requests import Reading, Readings, Request
from raptide.evaluation.results import Measure, Role
from raptide.evaluation.samples import mean_of
from raptide.evaluation.subjects.kmers import Kmers
from raptide.evaluation.subjects.phmmer import Phmmer, pyhmmer_version
from raptide.evaluation.subjects.subject import Subject
from raptide.evaluation.tasks.layers import Layer, resolve_layer
from raptide.evaluation.tasks.task import Outcome, TaskSettings

SHUFFLES = 100
SEED = 1

ROSSMANN_AND_PROPELLERS = frozenset(
    [f"c.{fold}" for fold in (2, 3, 4, 5, 27, 28, 30, 31)]
    + [f"b.{fold}" for fold in (66, 67, 68, 69, 70)]
)
"""Folds of SCOPe whose superfamilies are thought to be related (Söding and Remmert, 2011), so that
what is found between them may well be homologous."""


class HomologySettings(TaskSettings):
    """Homology as a benchmark asks for it."""

    kind: Literal["homology"] = "homology"
    domains: Path
    """Table of domains: `id`, `scop_class` or `cath`, `sequence`."""
    layers: tuple[Layer, ...] = Field(("middle", "last"), min_length=1)
    """Whose embeddings are compared; the last one named gives the main metric. A number counts from
    the front (0 is the embedding), or from the back if negative."""


class NamedLevel(NamedTuple):
    """A level, and what its metrics are called after."""

    suffix: str
    words: str
    level: Level


class Homology:
    """Hit-10 and AUC of a search with each domain, at fold and superfamily level."""

    version = 1
    main_metric = "hit10"
    needs = ("mean|hits",)
    random_weights = True
    how = (
        "Each domain is a query; all others are ranked by the cosine of their embeddings, the mean "
        "over residues, in an exact search (phmmer: by bit score; kmer: by the cosine of 3-mer "
        "counts). hit10 and auc are at fold level: a positive shares the query's fold but not its "
        "superfamily, and domains of its superfamily leave the ranking. At /superfamily level a "
        "positive shares the superfamily but not the family. CATH names no families, so there is "
        "no superfamily level with it. Queries without a positive are left out. Hit-10 is the "
        "share of queries with a positive among the ten nearest, ties broken against it, and what "
        "phmmer does not find is none (so it may lie below chance, which takes ten); AUC is "
        "the mean of the queries' areas under the ROC curve. With /filtered, the Rossmann-like "
        "folds and propellers of SCOPe leave queries and rankings (Söding and Remmert, Current "
        "Opinion in Structural Biology, 2011). Layers are not chosen on the data: each is "
        "reported, the last is the main one. Measures as in Rives et al., 2021. The control is "
        f"hit10 under {SHUFFLES} shuffles of the labels over domains, its interval over shuffles; "
        "chance follows from the sizes of folds and superfamilies."
    )

    def __init__(self, settings: HomologySettings) -> None:
        """Read the domains.

        Raises:
            InputError: the table is none, or no domain has a partner to find.
        """
        self.settings = settings
        self._domains = read_domains(settings.domains)
        self._levels = list(_levels(self._domains))
        if not self._levels or self._levels[0].suffix:
            raise InputError(
                "Homology at fold level needs two superfamilies in some fold, but no fold of "
                f"{settings.domains} has more than one; add domains of others."
            )

    def files(self) -> Sequence[Path]:
        return [self.settings.domains]

    def baselines(self) -> Sequence[Subject]:
        """phmmer is one if pyhmmer is installed."""
        found: list[Subject] = [Kmers()]
        if pyhmmer_version():
            found.append(Phmmer(list(dict.fromkeys(self._domains.sequences))))
        return found

    def requests(self, subject: Subject) -> Iterator[Request]:
        for reading in self._readings(subject):
            for sequence in self._domains.sequences:
                yield Request(reading, sequence)

    def measure(self, subject: Subject, readings: Readings) -> Outcome:
        outcome = Outcome(notes=list(self._notes()))
        asked = self._readings(subject)
        for reading in asked:
            main = reading == asked[-1]
            layer = reading.layer if reading.kind == "mean" and subject.layers else None
            outcome.measures += self._measures(self._blocks(reading, readings), layer, main)
        return outcome

    def _readings(self, subject: Subject) -> list[Reading]:
        """What is read of each domain; the last is the main one."""
        if "mean" not in subject.kinds:
            return [Reading("hits")]
        if not subject.layers:
            return [Reading("mean", 0)]
        layers = [resolve_layer(layer, subject) for layer in self.settings.layers]
        return [Reading("mean", layer) for layer in dict.fromkeys(reversed(layers))][::-1]

    def _blocks(self, reading: Reading, readings: Readings) -> Blocks:
        sequences = self._domains.sequences
        if reading.kind == "mean":
            return cosines(lambda i: readings.get(Request(reading, sequences[i])), len(sequences))
        # Hits are of the different sequences, in the order in which they are asked.
        return (
            (i, readings.get(Request(reading, sequence))[None, self._distinct])
            for i, sequence in enumerate(sequences)
        )

    @cached_property
    def _distinct(self) -> np.ndarray:
        """Which of the different sequences each domain has, [N] int64."""
        places: dict[str, int] = {}
        return np.array([places.setdefault(s, len(places)) for s in self._domains.sequences])

    def _measures(self, blocks: Blocks, layer: int | None, main: bool) -> Iterator[Measure]:
        levels = [each.level for each in self._levels]
        found, near, real = search(blocks, levels, len(self._domains.ids))
        for each, marks in zip(self._levels, found, strict=True):
            yield from self._rows(each.suffix, marks, layer, main)
        if main:
            shuffled = control(near, real, levels[0], SHUFFLES, SEED)
            yield self._measure("control/hit10", shuffled, None, "control")
            yield self._measure("chance/hit10", [chance(levels[0])], None, "chance")

    def _rows(self, suffix: str, found: Found, layer: int | None, main: bool) -> Iterator[Measure]:
        role: Role = "main" if main and not suffix else "more"
        yield self._measure(f"hit10{suffix}", found.hits, layer, role)
        yield self._measure(f"auc{suffix}", found.areas, layer, "more")

    def _measure(
        self, metric: str, values: np.ndarray | list[float], layer: int | None, role: Role
    ) -> Measure:
        stem = self.settings.domains.stem
        return Measure(metric, stem, mean_of(values), role=role, layer=layer)

    def _notes(self) -> Iterator[str]:
        for each in self._levels:
            queries, kept = each.level.queries.sum(), each.level.kept.sum()
            yield (
                f"{each.words}: {queries:,} of {kept:,} domains are queries; {kept - queries:,} "
                "have no positive and are left out."
            )
        if self._domains.scheme == "CATH":
            yield "CATH names no families below its superfamilies: no superfamily level."
        else:
            automatic = sum(label.endswith(".0") for label in self._domains.classes)
            yield (
                f"{automatic:,} domains are in a family 0 of SCOPe (automated matches), which "
                "counts as a family like others."
            )
        if not pyhmmer_version():
            yield "phmmer is not among the baselines; for it, pip install pyhmmer."


def _levels(domains: Domains) -> Iterator[NamedLevel]:
    """Levels with a query; that of folds, if there is one, comes first."""
    folds, superfamilies = domains.labels("fold"), domains.labels("superfamily")
    families = domains.labels("family")
    assert folds
    assert superfamilies
    whole = np.ones(len(folds), bool)
    parts = [("", "", whole)]
    if domains.scheme == "SCOPe":
        filtered = np.array([fold not in ROSSMANN_AND_PROPELLERS for fold in folds])
        parts.append(("/filtered", " without Rossmann-like folds and propellers", filtered))
    for suffix, words, kept in parts:
        pairs = [("", "Fold level", folds, superfamilies)]
        if families:
            pairs.append(("/superfamily", "Superfamily level", superfamilies, families))
        for name, title, outer, inner in pairs:
            level = level_of(outer, inner, kept)
            if level.queries.any():
                yield NamedLevel(name + suffix, title + words, level)
