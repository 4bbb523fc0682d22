"""What a model knows of mutations without having seen one measured: deep mutational scans.

Measures, for each assay (the dataset) and each method:

    spearman ndcg top10 auc mcc     of the first of `methods`
    METHOD/spearman ...             of the others, such as masked-marginals/spearman

and over assays (the dataset `all`) the same by ProteinGym's grouped mean, and `METRIC/mean`, plain.
A subject without layers does not look at the protein around a residue, and one that is blind to the
residue itself (an LSTM) does not see what would be masked: all methods would read the same off
them, so they are asked once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
from pydantic import Field

from raptide.alphabet import STANDARD
from raptide.evaluation.datasets.assays import ALL, Assay, find_files, read_assays
from raptide.evaluation.metrics.variants import METRICS, Scan, Scans, group
from raptide.evaluation.requests import Reading, Readings, Request
from raptide.evaluation.results import Figure, Heatmap, Lines, Measure, Role
from raptide.evaluation.samples import Sample, mean_of
from raptide.evaluation.subjects.blosum import Blosum
from raptide.evaluation.subjects.model import ModelSubject
from raptide.evaluation.subjects.ngrams import natural_unigram
from raptide.evaluation.subjects.predictions import Predictions
from raptide.evaluation.subjects.subject import Subject
from raptide.evaluation.tasks.marginals import cut_pieces, score_assay
from raptide.evaluation.tasks.shuffles import order_by_hash
from raptide.evaluation.tasks.task import Outcome, TaskSettings
from raptide.methods import VariantMethod

CONTROL_VARIANTS = 1000
"""Of an assay at most, in the control, which is the more exact the more assays there are."""

WIDEST_LANDSCAPE = 400
"""Positions of a protein whose scan is drawn."""


class VariantsSettings(TaskSettings):
    assays: str
    """A path or glob of scans, as `datasets/assays.py` reads them."""
    reference: str | None = None
    """ProteinGym's DMS_substitutions.csv."""
    methods: tuple[VariantMethod, ...] = Field(("wt-marginals", "masked-marginals"), min_length=1)
    """The first one's metrics have no prefix."""
    window: int = Field(1022, ge=2)
    """Residues that are looked at at once of a longer protein, by the marginals."""


class Variants:
    """Kind `variants`."""

    version: ClassVar[int] = 1
    main_metric: ClassVar[str] = "spearman"
    needs: ClassVar[tuple[str, ...]] = ("marginals|scores",)
    random_weights: ClassVar[bool] = True
    how: ClassVar[str] = (
        "A substitution scores log p(mutant) - log p(wild type) at its position, with the protein "
        "as it is (wt-marginals) or with that position masked (masked-marginals); several add up "
        "(Meier et al., NeurIPS 2021). pseudo-ppl is the difference of pseudo log likelihoods of "
        "the whole sequences. Proteins longer than 1,022 residues are read in ProteinGym's "
        "windows. Spearman, NDCG and recall of the top 10%, AUC, and MCC with the scores cut at "
        "their median are ProteinGym v1.3's (Notin et al., NeurIPS 2023), and so is the mean: "
        "three decimals an assay, over the assays of one protein and selection type, over the "
        "proteins of a type, over types. METRIC/mean is the plain mean. Intervals are over the "
        "positions of an assay, or over assays. The control's measurements are shuffled within "
        "each assay, and it has at most 1,000 variants of each."
    )

    def __init__(self, settings: VariantsSettings) -> None:
        """Read and check all assays.

        Raises:
            InputError: as `read_assays`.
        """
        self.settings = settings
        self._reference = Path(settings.reference) if settings.reference else None
        self._files = find_files(settings.assays)
        self.assays = read_assays(self._files, self._reference)

    def files(self) -> Sequence[Path]:
        return [*self._files, *([self._reference] if self._reference else [])]

    def baselines(self) -> Sequence[Subject]:
        return [Blosum(), natural_unigram()]

    def methods(self, subject: Subject) -> list[VariantMethod]:
        """Those that a subject is asked for."""
        blind = isinstance(subject, ModelSubject) and subject.model.blind
        if subject.layers and not blind:
            return list(dict.fromkeys(self.settings.methods))
        return ["wt-marginals"] if "marginals" in subject.kinds else []

    def cost(self, subject: Subject) -> str:
        """What pseudo-ppl takes, to be printed before it runs; "" where it is not asked for."""
        if "pseudo-ppl" not in self.methods(subject):
            return ""
        lengths = [(len(each.target), len(each.mutants) + 1) for each in self.assays]
        passes = sum(length * variants for length, variants in lengths)
        tokens = sum((length + 2) * length * variants for length, variants in lengths)
        return (
            f"pseudo-ppl of {subject.name}: {passes:,} forward passes, {tokens:,} tokens "
            f"(a pass for each residue of each of {sum(v for _, v in lengths):,} sequences)"
        )

    def requests(self, subject: Subject) -> Iterator[Request]:
        for method in self.methods(subject):
            for assay in self.assays:
                if method == "pseudo-ppl":
                    yield from _ask_pseudo(assay)
                else:
                    for piece in cut_pieces(assay, method, self.settings.window):
                        yield piece.request

    def measure(self, subject: Subject, readings: Readings) -> Outcome:
        if isinstance(subject, Predictions):
            found = {assay.name: subject.scores(assay) for assay in self.assays}
            return self.measure_scores({k: v for k, v in found.items() if v is not None})
        outcome = Outcome()
        for index, method in enumerate(self.methods(subject)):
            scores = {each.name: self._score(each, method, readings) for each in self.assays}
            self._measure(f"{method}/" if index else "", scores, outcome)
        return outcome

    def measure_scores(self, scores: Mapping[str, np.ndarray]) -> Outcome:
        """Make measures of anyone's scores, as of a subject's.

        Args:
            scores: of the variants of each assay, by its name, [n].
        """
        outcome = Outcome()
        self._measure("", scores, outcome)
        return outcome

    def _score(self, assay: Assay, method: VariantMethod, readings: Readings) -> np.ndarray:
        if method == "pseudo-ppl":
            before, *after = (float(readings.get(each)[0]) for each in _ask_pseudo(assay))
            return np.array(after) - before
        return score_assay(assay, method, self.settings.window, readings)

    def _measure(self, prefix: str, scores: Mapping[str, np.ndarray], outcome: Outcome) -> None:
        """Add what one method's scores are worth."""
        assays = [assay for assay in self.assays if assay.name in scores]
        if not assays:
            outcome.notes.append("There is no score of any assay.")
            return
        found: dict[str, list[float]] = {}
        for assay in assays:
            for metric in METRICS:
                scan = Scan(metric, assay.scores, scores[assay.name], assay.fit, assay.units)
                outcome.measures.append(Measure(prefix + metric, assay.name, scan))
                found.setdefault(metric, []).append(scan.value())
        proteins = [assay.protein for assay in assays]
        selections = [assay.selection for assay in assays]
        for metric, values in found.items():
            main: Role = "main" if prefix + metric == self.main_metric else "more"
            means: dict[str, Sample] = {
                metric: group(values, proteins, selections),
                f"{metric}/mean": mean_of(values),
            }
            outcome.measures += [
                Measure(prefix + name, ALL, sample, role=main if name == metric else "more")
                for name, sample in means.items()
            ]
        if not prefix:
            control = _shuffle([(assay, scores[assay.name]) for assay in assays])
            outcome.measures += [
                Measure("control/spearman", ALL, control, role="control"),
                Measure("chance/spearman", ALL, mean_of([0.0]), role="chance"),
            ]
            outcome.notes += self._notes(assays, found)
        outcome.figures += _draw(prefix, assays, scores, found)

    def _notes(self, assays: list[Assay], found: Mapping[str, list[float]]) -> list[str]:
        notes = []
        if left := len(self.assays) - len(assays):
            notes.append(f"{left:,} of {len(self.assays):,} assays have no score.")
        if binless := [assay.name for assay in assays if assay.bins is None]:
            notes.append(
                f"AUC and MCC cut what was measured at its median, for want of bins, in "
                f"{len(binless):,} of {len(assays):,} assays: {', '.join(binless)[:200]}."
            )
        for metric, values in found.items():
            if empty := [a.name for a, v in zip(assays, values, strict=True) if np.isnan(v)]:
                notes.append(
                    f"{metric} is no number in {len(empty):,} assays, which its means leave out: "
                    f"{', '.join(empty)[:200]}."
                )
        return notes


def _ask_pseudo(assay: Assay) -> Iterator[Request]:
    """The protein, then each of its variants."""
    yield Request(Reading("pseudo"), assay.target)
    for variant in range(len(assay.mutants)):
        yield Request(Reading("pseudo"), assay.sequence(variant))


def _shuffle(pairs: Sequence[tuple[Assay, np.ndarray]]) -> Scans:
    """Scores against what was measured of other variants of the same assay."""
    truth, scores, units, ends, unit = [], [], [], [], 0
    for assay, predicted in pairs:
        kept = order_by_hash(assay.name, assay.mutants, "control")[:CONTROL_VARIANTS]
        other = order_by_hash(assay.name, [assay.mutants[i] for i in kept], "shuffled")
        truth.append(assay.scores[kept][other])
        scores.append(predicted[kept])
        _, codes = np.unique(assay.units[kept], return_inverse=True)
        units.append(codes + unit)
        unit += int(codes.max()) + 1
        ends.append(len(kept))
    return Scans(
        np.concatenate(truth), np.concatenate(scores), np.concatenate(units), np.cumsum(ends)
    )


def _draw(
    prefix: str,
    assays: Sequence[Assay],
    scores: Mapping[str, np.ndarray],
    found: Mapping[str, list[float]],
) -> list[Figure]:
    """Bars of all assays, and the landscape of the first that is narrow enough."""
    names = [assay.name for assay in assays]
    method = f" ({prefix.rstrip('/')})" if prefix else ""
    figures: list[Figure] = [
        Lines(
            f"Spearman by assay{method}",
            "assay",
            "Spearman",
            list(map(float, range(len(names)))),
            {"spearman": found["spearman"]},
            names,
        )
    ]
    narrow = [each for each in assays if len(each.positions) <= WIDEST_LANDSCAPE]
    for assay in [] if prefix else narrow[:1]:
        for what, values in (("measured", assay.scores), ("scored", scores[assay.name])):
            figures.append(_landscape(f"{assay.name}, {what}", assay, values))
    return figures


def _landscape(title: str, assay: Assay, values: np.ndarray) -> Heatmap:
    """Letters by positions: of single substitutions, the share of variants that are below them."""
    variant, position, _, mutant = assay.changes
    single = np.bincount(variant, minlength=len(values))[variant] == 1
    positions = assay.positions
    table = np.full((len(STANDARD), len(positions)), np.nan, np.float32)
    below = np.searchsorted(np.sort(values), values) / len(values)
    columns = np.searchsorted(positions, position[single])
    table[mutant[single], columns] = below[variant[single]]
    names = [f"{assay.target[each]}{each + 1}" for each in positions]
    return Heatmap(title, table, row_names=list(STANDARD), column_names=names)
