"""Representation space: where residues and proteins lie that are alike."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from raptide.alphabet import STANDARD
from raptide.errors import InputError
from raptide.evaluation.datasets.domains import read_domains
from raptide.evaluation.metrics.space import (
    cosine_distances,
    plane,
    shuffled_silhouettes,
    silhouettes,
)
from raptide.evaluation.requests import Reading, Readings, Request
from raptide.evaluation.results import Figure, Measure, Points, Role
from raptide.evaluation.samples import mean_of
from raptide.evaluation.subjects.subject import Subject
from raptide.evaluation.tasks.task import Outcome, TaskSettings

SHUFFLES = 1000
SEED = 1

CLASSES = {
    "hydrophobic": "GAPVLIM",
    "aromatic": "FYW",
    "polar": "STCNQ",
    "positively charged": "KRH",
    "negatively charged": "DE",
}
"""By the side chain at pH 7: Nelson and Cox, Lehninger Principles of Biochemistry, chapter 3 (whose
nonpolar, aliphatic class is the first)."""

SIZES = {"below 120 Da": "GASPVT", "120 to 150 Da": "CLINDQKEM", "above 150 Da": "HFRYW"}
"""By the mass of the free amino acid; the paper's three sizes."""

MOST_FOLDS = 8
MOST_PROTEINS = 100
"""Of a fold or a family, those with the lowest hashes of their ids."""

Grouping = Literal["fold", "superfamily", "family"]


class SpaceSettings(TaskSettings):
    """The space task as a benchmark asks for it."""

    kind: Literal["space"] = "space"
    domains: Path | None = None
    """Table of domains, as homology takes it; without it, residues alone are looked at."""
    group_by: Grouping = "fold"
    """What proteins are coloured by. CATH names no families."""


class Space:
    """How far classes of residues, and folds of proteins, keep apart."""

    version = 1
    main_metric = "letters-silhouette"
    needs = ("letters",)
    random_weights = True
    how = (
        "letters-silhouette is the mean silhouette (Rousseeuw, 1987) of the 20 residue letters' "
        "output embeddings by cosine distance, in classes by side chain: "
        + "; ".join(f"{name} {letters}" for name, letters in CLASSES.items())
        + " (Nelson and Cox, Lehninger Principles of Biochemistry). 1 is far apart, below 0 is "
        "mixed. letters-size-silhouette is the same for three sizes, by the mass of the amino "
        "acid. proteins-silhouette takes mean embeddings of the last layer, of proteins of the "
        f"{MOST_FOLDS} largest folds (at most {MOST_PROTEINS} of each). Intervals are over letters "
        "and proteins, each with its silhouette. The controls are the mean silhouette under "
        f"{SHUFFLES:,} shuffles of the classes, which is at most 0 where nothing keeps apart; "
        "/shuffled-as-well is the share of shuffles that keep apart as well as the classes do (the "
        "classes themselves count as one). Points are the first two principal components."
    )

    def __init__(self, settings: SpaceSettings) -> None:
        """Choose the proteins.

        Raises:
            InputError: the table is none, or holds too few groups.
        """
        self.settings = settings
        self._proteins = _choose(settings.domains, settings.group_by) if settings.domains else []

    def files(self) -> Sequence[Path]:
        return [self.settings.domains] if self.settings.domains else []

    def baselines(self) -> Sequence[Subject]:
        return []

    def requests(self, subject: Subject) -> Iterator[Request]:
        yield Request(Reading("letters"), "")
        if "mean" in subject.kinds:
            for sequence, _ in self._proteins:
                yield Request(Reading("mean", subject.layers), sequence)

    def measure(self, subject: Subject, readings: Readings) -> Outcome:
        outcome = Outcome()
        letters = readings.get(Request(Reading("letters"), ""))
        self._letters(outcome, letters, "letters", CLASSES, "main")
        self._letters(outcome, letters, "letters-size", SIZES, "more")
        if self._proteins and "mean" in subject.kinds:
            reading = Reading("mean", subject.layers)
            requests = [Request(reading, sequence) for sequence, _ in self._proteins]
            vectors = np.stack([readings.get(request) for request in requests])
            names = [name for _, name in self._proteins]
            assert self.settings.domains
            dataset = self.settings.domains.stem
            layer = subject.layers or None
            outcome.measures += _separation("proteins", dataset, vectors, names, "more", layer)
            title = f"Proteins by {self.settings.group_by}"
            outcome.figures += _picture(title, vectors, names)
        return outcome

    def _letters(
        self,
        outcome: Outcome,
        letters: np.ndarray,
        prefix: str,
        classes: dict[str, str],
        role: Role,
    ) -> None:
        names = [_class_of(letter, classes) for letter in STANDARD]
        outcome.measures += _separation(prefix, "letters", letters, names, role, None)
        title = "Residue letters by " + ("size" if classes is SIZES else "side chain")
        outcome.figures += _picture(title, letters, names, list(STANDARD))


def _class_of(letter: str, classes: dict[str, str]) -> str:
    return next(name for name, letters in classes.items() if letter in letters)


def _separation(
    prefix: str,
    dataset: str,
    vectors: np.ndarray,
    names: list[str],
    role: Role,
    layer: int | None,
) -> Iterator[Measure]:
    """How far named groups of vectors [n, D] keep apart, with its control."""
    metric = f"{prefix}-silhouette"
    distances = cosine_distances(vectors)
    groups = np.unique(names, return_inverse=True)[1]
    each = silhouettes(distances, groups)
    shuffled = shuffled_silhouettes(distances, groups, SHUFFLES, SEED)
    as_well = np.concatenate([[1.0], ~(shuffled < each.mean())])  # also if they are no numbers
    yield Measure(metric, dataset, mean_of(each), role=role, layer=layer)
    yield Measure(
        f"{metric}/shuffled-as-well", dataset, mean_of(as_well), higher_is_better=False, layer=layer
    )
    yield Measure(f"control/{metric}", dataset, mean_of(shuffled), role="control", layer=layer)
    yield Measure(f"chance/{metric}", dataset, mean_of([0.0]), role="chance", layer=layer)


def _picture(
    title: str, vectors: np.ndarray, names: list[str], labels: list[str] | None = None
) -> list[Figure]:
    """Of vectors that are numbers; a diverged model's are not."""
    if not np.isfinite(vectors).all():
        return []
    return [Points(title, plane(vectors), names, labels)]


def _choose(path: Path, group_by: Grouping) -> list[tuple[str, str]]:
    """Sequences of the largest groups, and each one's group, in the order of the file."""
    domains = read_domains(path)
    labels = domains.labels(group_by)
    if labels is None:
        raise InputError(
            f"CATH names no {group_by} below its superfamilies, but `group_by` asks for it with "
            f"{path}; group by fold or superfamily."
        )
    sizes = Counter(labels)
    largest = sorted(sizes, key=lambda label: (-sizes[label], label))[:MOST_FOLDS]
    if len(largest) < 2 or sizes[largest[1]] < 2:
        raise InputError(
            f"Proteins are compared by {group_by}, for which two with two members each are needed, "
            f"but {path} has fewer; leave `domains` out, or give another table."
        )
    chosen = set()
    for label in largest:
        members = [i for i, other in enumerate(labels) if other == label]
        members.sort(key=lambda i: hashlib.sha256(domains.ids[i].encode()).digest())
        chosen |= set(members[:MOST_PROTEINS])
    return [(domains.sequences[i], labels[i]) for i in sorted(chosen)]
