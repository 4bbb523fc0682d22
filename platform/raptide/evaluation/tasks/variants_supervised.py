"""What a few measured variants teach through a model's embeddings: regression on scans.

Of each assay a random 80% is learned from (also 10% and 1%), and Spearman computed on the rest, in
five splits; both are pinned by hashes of the variants. Measures, for each assay and for `all`:

    spearman              80%; spearman/10%, spearman/1%. On mean or on site embeddings, whichever
                          has the smaller left-out error on what is learned from
    mean-spearman         the former alone, and
    sites-spearman        the latter: at the changed positions, averaged
    augmented-spearman    one-hot letters and the model's wt-marginals score (Hsu et al., 2022)

The baseline `one-hot` has letters for embeddings. Regression is ridge (`evaluation/ridge.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
from pydantic import Field

from raptide.errors import InputError
from raptide.evaluation.datasets.assays import ALL, Assay, find_files, read_assays
from raptide.evaluation.metrics.variants import spearman
from raptide.evaluation.requests import Kind, Reading, Readings, Request
from raptide.evaluation.results import Lines, Measure, Role
from raptide.evaluation.ridge import Fit, fit_ridge
from raptide.evaluation.samples import mean_of
from raptide.evaluation.subjects.letters import OneHotLetters
from raptide.evaluation.subjects.subject import Subject
from raptide.evaluation.tasks.marginals import cut_pieces, score_assay
from raptide.evaluation.tasks.shuffles import order_by_hash
from raptide.evaluation.tasks.task import Outcome, TaskSettings

SHARES = {"": 0.8, "/10%": 0.1, "/1%": 0.01}
"""Of an assay's variants that are learned from, by what metrics' names end in."""

FEWEST_LEARNED = 3
FEWEST_VARIANTS = 20

SHUFFLES = 8
"""Of the targets, a split, in the control."""

EMBEDDINGS: tuple[Kind, ...] = ("mean", "sites")


class VariantsSupervisedSettings(TaskSettings):
    assays: str
    """A path or glob of scans, as `datasets/assays.py` reads them."""
    reference: str | None = None
    """ProteinGym's DMS_substitutions.csv."""
    layer: int = -1
    """That embeddings come of; negative counts from the last."""
    splits: int = Field(5, ge=1)
    most_variants: int = Field(2000, ge=FEWEST_VARIANTS)
    """Of an assay; more are drawn from by hash."""
    window: int = Field(1022, ge=2)
    """Residues of a longer protein that are embedded, if all variants lie within as many."""


class Features(NamedTuple):
    """What variants are described by, n of them."""

    embeddings: dict[str, np.ndarray]
    """[n, D] each, by name; none for a subject of letters."""
    letters: Letters
    score: np.ndarray | None
    """Zero-shot, [n] float64."""


class Letters(NamedTuple):
    """One-hot letters by position, less those of the protein."""

    table: np.ndarray
    """[n, D]; columns that are the same in all variants left out."""
    own: float
    """Squared length of what each variant has besides, that no other one has."""


class VariantsSupervised:
    """Kind `variants-supervised`."""

    version: ClassVar[int] = 1
    main_metric: ClassVar[str] = "spearman"
    needs: ClassVar[tuple[str, ...]] = ("mean|letters",)
    random_weights: ClassVar[bool] = True
    how: ClassVar[str] = (
        "Ridge regression on embeddings of the mutant sequences, fitted on a random 80% of each "
        "assay (10%, 1%), Spearman on the rest, the mean of five splits (the setting of Rives et "
        "al., PNAS 2021). The penalty, and whether means or the changed sites are looked at, are "
        "chosen by the left-out error on the fitted part. augmented-spearman regresses on one-hot "
        "letters and, without penalty, the wt-marginals score (Hsu et al., Nature Biotechnology "
        "2022). Constant predictions count as 0. Intervals are over splits and assays. The "
        "control is fitted to shuffled targets."
    )

    def __init__(self, settings: VariantsSupervisedSettings) -> None:
        """Read and check all assays.

        Raises:
            InputError: as `read_assays`.
        """
        self.settings = settings
        self._reference = Path(settings.reference) if settings.reference else None
        self._files = find_files(settings.assays)
        given = read_assays(self._files, self._reference)
        self.assays = [self._bound(each) for each in given if len(each.mutants) >= FEWEST_VARIANTS]
        self._left_out = [each.name for each in given if len(each.mutants) < FEWEST_VARIANTS]
        if not self.assays:
            raise InputError(
                f"Regression on variants needs {FEWEST_VARIANTS} of them in an assay, but none of "
                f"{settings.assays} has as many; give larger ones."
            )

    def _bound(self, assay: Assay) -> Assay:
        order = order_by_hash(assay.name, assay.mutants, "most variants")
        return assay.take(np.sort(order[: self.settings.most_variants]))

    def files(self) -> Sequence[Path]:
        return [*self._files, *([self._reference] if self._reference else [])]

    def baselines(self) -> Sequence[Subject]:
        return [OneHotLetters()]

    def requests(self, subject: Subject) -> Iterator[Request]:
        for assay in self.assays:
            for variant in range(len(assay.mutants)):
                yield from self._ask(assay, variant, subject).values()
            if self._scores(subject):
                for piece in cut_pieces(assay, "wt-marginals", self.settings.window):
                    yield piece.request

    def measure(self, subject: Subject, readings: Readings) -> Outcome:
        outcome = Outcome()
        layer = self._layer(subject) if "mean" in subject.kinds else None
        found = {each.name: self._regress(each, subject, readings) for each in self.assays}
        pooled: dict[str, list[float]] = {}
        for assay, values in found.items():
            for metric, splits in values.items():
                pooled.setdefault(metric, []).extend(splits)
                if not metric.startswith("control/"):
                    sample = mean_of(splits)
                    outcome.measures.append(Measure(metric, assay, sample, layer=layer))
        for metric, all_splits in pooled.items():
            roles: dict[str, Role] = {"spearman": "main", "control/spearman": "control"}
            role = roles.get(metric, "more")
            outcome.measures.append(
                Measure(metric, ALL, mean_of(all_splits), role=role, layer=layer)
            )
        outcome.measures.append(Measure("chance/spearman", ALL, mean_of([0.0]), role="chance"))
        if self._left_out:
            outcome.notes.append(
                f"{len(self._left_out):,} assays have fewer than {FEWEST_VARIANTS} variants and "
                f"are left out: {', '.join(self._left_out)[:200]}."
            )
        outcome.figures.append(_draw(pooled))
        return outcome

    def _layer(self, subject: Subject) -> int:
        layer = self.settings.layer
        counted = layer if layer >= 0 else subject.layers + 1 + layer
        if not 0 <= counted <= subject.layers:
            raise InputError(
                f"`layer` of {self.settings.name or self.settings.kind} is {layer}, but "
                f"{subject.name} has layers 0 to {subject.layers}; give one of them."
            )
        return counted

    def _scores(self, subject: Subject) -> bool:
        return {"mean", "marginals"} <= subject.kinds

    def _ask(self, assay: Assay, variant: int, subject: Subject) -> dict[str, Request]:
        """What describes a variant; nothing of a subject that has letters alone."""
        if "mean" not in subject.kinds:
            return {}
        start, stop = _cut(assay, self.settings.window)
        sequence = assay.sequence(variant)[start:stop]
        changed = assay.changes.position[assay.changes.variant == variant] - start
        layer = self._layer(subject)
        asked = {"mean": Request(Reading("mean", layer), sequence)}
        if "sites" in subject.kinds:
            asked["sites"] = Request(Reading("sites", layer), sequence, tuple(changed.tolist()))
        return asked

    def _describe(self, assay: Assay, subject: Subject, readings: Readings) -> Features:
        score = None
        if self._scores(subject):
            score = score_assay(assay, "wt-marginals", self.settings.window, readings)
        rows: dict[str, list[np.ndarray]] = {}
        for variant in range(len(assay.mutants)):
            for name, request in self._ask(assay, variant, subject).items():
                vectors = np.atleast_2d(readings.get(request))
                rows.setdefault(name, []).append(vectors.mean(0))
        embeddings = {name: np.stack(each) for name, each in rows.items()}
        return Features(embeddings, one_hot(assay), score)

    def _regress(
        self, assay: Assay, subject: Subject, readings: Readings
    ) -> dict[str, list[float]]:
        """Spearman of every split, by metric."""
        features = self._describe(assay, subject, readings)
        found: dict[str, list[float]] = {}
        for split in range(self.settings.splits):
            order = order_by_hash(assay.name, assay.mutants, f"split {split}")
            for end, share in SHARES.items():
                size = max(FEWEST_LEARNED, round(share * len(order)))
                learned, rest = np.sort(order[:size]), np.sort(order[size:])
                fits = _fit_embeddings(assay, features, learned, rest, 0 if end else SHUFFLES)
                for name, values in _compare(assay.scores[rest], fits).items():
                    found.setdefault(name + end, []).extend(values)
                if features.score is not None:
                    fit = _fit_augmented(assay, features.letters, features.score, learned, rest)
                    value = _spearman(assay.scores[rest], fit.predictions[:, 0])
                    found.setdefault(f"augmented-spearman{end}", []).append(value)
        return found


def one_hot(assay: Assay) -> Letters:
    """What regression on the letters of whole sequences comes down to."""
    variant, position, wild_type, mutant = assay.changes
    codes = np.concatenate([position * 20 + wild_type, position * 20 + mutant])
    single = len(variant) == len(assay.mutants)
    if single:  # then each new letter is one variant's own
        codes = codes[: len(variant)]
    known, columns = np.unique(codes, return_inverse=True)
    table = np.zeros((len(assay.mutants), len(known)), np.float32)
    table[variant, columns[: len(variant)]] = -1
    if not single:
        table[variant, columns[len(variant) :]] = 1
    return Letters(table, 1.0 if single else 0.0)


def _cut(assay: Assay, window: int) -> tuple[int, int]:
    """The part of the protein that is embedded."""
    first, last = int(assay.positions[0]), int(assay.positions[-1])
    if len(assay.target) <= window or last - first >= window:
        return 0, len(assay.target)
    start = min(max(0, (first + last + 1 - window) // 2), len(assay.target) - window)
    return start, start + window


def _fit_embeddings(
    assay: Assay, features: Features, learned: np.ndarray, rest: np.ndarray, shuffles: int
) -> dict[str, Fit]:
    """By the embeddings' name; the first target is true, the others are shuffled."""
    mutants = [assay.mutants[i] for i in learned]
    orders = [order_by_hash(assay.name, mutants, f"shuffle {each}") for each in range(shuffles)]
    scores = assay.scores[learned]
    targets = np.stack([scores, *(scores[order] for order in orders)], 1)
    if not features.embeddings:
        table, own = features.letters
        return {"letters": fit_ridge(table[learned], targets, table[rest], own=own)}
    return {
        name: fit_ridge(table[learned], targets, table[rest])
        for name, table in features.embeddings.items()
    }


def _fit_augmented(
    assay: Assay, letters: Letters, score: np.ndarray, learned: np.ndarray, rest: np.ndarray
) -> Fit:
    free = (score[learned, None], score[rest, None])
    table, own = letters
    return fit_ridge(table[learned], assay.scores[learned, None], table[rest], free, own)


def _compare(truth: np.ndarray, fits: Mapping[str, Fit]) -> dict[str, list[float]]:
    """Spearman of the better fit by its left-out error, of each alone, and of shuffled targets."""
    names = list(fits)
    best = np.argmin([fits[name].errors for name in names], 0)
    chosen = [fits[names[each]].predictions[:, i] for i, each in enumerate(best)]
    values = [_spearman(truth, each) for each in chosen]
    found = {"spearman": values[:1]}
    if len(values) > 1:
        found["control/spearman"] = values[1:]
    if len(names) > 1:
        alone = {name: fits[name].predictions[:, 0] for name in names}
        found |= {f"{name}-spearman": [_spearman(truth, each)] for name, each in alone.items()}
    return found


def _spearman(truth: np.ndarray, predicted: np.ndarray) -> float:
    return float(np.nan_to_num(spearman(truth, predicted)))


def _draw(pooled: Mapping[str, list[float]]) -> Lines:
    """What more variants to learn from bring."""
    ends = list(reversed(SHARES))
    names = [name for name in pooled if "/" not in name]
    return Lines(
        "Spearman by the share of variants that is learned from",
        "share",
        "Spearman",
        [0.0, 1.0, 2.0],
        {name: [float(np.mean(pooled[name + end])) for end in ends] for name in names},
        [f"{SHARES[end]:.0%}" for end in ends],
    )
