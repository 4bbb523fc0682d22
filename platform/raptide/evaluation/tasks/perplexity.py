"""The task `perplexity`: residues of proteins that were not trained on, predicted."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import ClassVar, Literal, NamedTuple

import numpy as np
from pydantic import Field, model_validator

from raptide.alphabet import decode_sequences
from raptide.data.corpus import MANIFEST, Corpus
from raptide.data.corpus_files import CorpusFiles, sha256_of_file
from raptide.data.fasta import ReadingRules
from raptide.data.streaming.rows import Sampling
from raptide.errors import CorpusError
from raptide.evaluation.counting import CorpusText, FastaText, KeptCounts, Text
from raptide.evaluation.masks import SHUFFLED, choose_residues
from raptide.evaluation.ngrams import MOST_ORDER, NgramCounts
from raptide.evaluation.requests import Reading, Readings, Request
from raptide.evaluation.results import Lines, Measure, Role
from raptide.evaluation.samples import Ratio
from raptide.evaluation.subjects.ngrams import ngram, uniform, unigram
from raptide.evaluation.subjects.subject import Subject
from raptide.evaluation.tasks.task import Outcome, TaskSettings
from raptide.small_files import write_whole
from raptide.storage import is_uri
from raptide.training.watching.heldout import LENGTHS, bucket_names

TRUE = Reading("masked")
DRAWN = Reading("masked", method=SHUFFLED)


class PerplexitySettings(TaskSettings):
    """Proteins to predict residues of, and those that the baselines are counted on."""

    kind: Literal["perplexity"] = "perplexity"

    corpus: Path | str | None = None
    """Folder or URI of a corpus: representatives of its held-out clusters are predicted, its
    training side is counted."""

    sampling: Sampling = "representatives"
    """Which members of the training side are counted."""

    fasta: Path | None = None
    """Or a file of proteins to predict."""

    train_fasta: Path | None = None
    """And one of those to count."""

    counts: Path | None = None
    """What jobs/count_ngrams.py has counted, instead of counting here."""

    most_proteins: int = Field(20_000, ge=1)
    """Of more, those come first whose hash does."""

    @model_validator(mode="after")
    def _one_source(self) -> PerplexitySettings:
        if (self.corpus is None) == (self.fasta is None):
            raise ValueError("give either corpus or fasta")
        sides = [self.corpus, self.train_fasta]
        if all(sides) or not any([*sides, self.counts]):
            raise ValueError("fasta, and it alone, needs train_fasta, or counts instead")
        return self


class _Found(NamedTuple):
    """What was found of each of n proteins, [n] float64."""

    length: np.ndarray
    chosen: np.ndarray
    """Residues that were."""
    nats: np.ndarray
    """-log p of their letters, summed up."""
    masked: np.ndarray
    """Those shown as `<mask>`."""
    masked_nats: np.ndarray
    right: np.ndarray
    """Of these, whose letter was the likeliest."""
    control_nats: np.ndarray
    """-log p of letters drawn in their place."""
    chance_nats: np.ndarray
    """-log of the shares by which they were drawn."""


class PerplexityTask:
    """ECE and accuracy at residues chosen by hash.

    Args:
        settings: with paths as they are opened.
        cache: folder where counted n-grams are kept.

    Raises:
        InputError: a file is no protein FASTA, or a corpus is none or holds nothing out.
    """

    version: ClassVar[int] = 1
    main_metric: ClassVar[str] = "ece-masked"
    needs: ClassVar[tuple[str, ...]] = ("masked",)
    random_weights: ClassVar[bool] = False
    how: ClassVar[str] = (
        "Of each protein 15% of the residues are chosen, at least one, by a hash of its sequence, "
        "so that they are the same for every model and in every run. Of these 80% are shown as "
        "<mask>, 10% as a random residue and 10% as they are, as in the paper's training (Rives et "
        "al., PNAS 2021). ece is exp of the mean -log p of all chosen residues, with the softmax "
        "over the whole vocabulary: 1 is perfect, 25 is uniform over the residue letters. Residues "
        "that are shown as they are can be copied, so ece-masked and accuracy, the share of "
        "residues whose letter is the likeliest, are of those shown as <mask> alone. ece/A-B is "
        "the ece of proteins of A to B residues. Where there are more proteins than most_proteins, "
        "those are taken whose sequences come first in the order of a hash; equal sequences count "
        "once. Intervals are bootstrapped over proteins. The baselines are counted on the training "
        "proteins: uniform and unigram know no context; n-grams predict each of the same residues "
        "from the n - 1 true ones before it, with interpolated Kneser-Ney smoothing (Chen and "
        "Goodman, 1999). The control scores a letter drawn by a hash, with the shares of "
        "Swiss-Prot, in place of each true one shown as <mask>; whoever has not seen the draw "
        "comes, on the average, to no less than chance, which is exp of the mean -log of these "
        "shares."
    )

    def __init__(self, settings: PerplexitySettings, cache: Path) -> None:
        self.settings = settings
        self._text, trained = _sides(settings)
        self._manifest = _manifest_here(settings.corpus, cache) if settings.corpus else None
        if settings.counts:
            digest, counts = sha256_of_file(settings.counts), NgramCounts.load(settings.counts)
            self._counts = digest, lambda: counts
        else:
            assert trained
            kept = KeptCounts(trained, cache)
            self._counts = kept.digest, kept.get
        self._find_last()

    def _find_last(self) -> None:
        """Count the proteins, and find the last hash that is still taken."""
        hashes, self._proteins = np.empty(0, np.uint64), 0
        for sequences in self._batches():
            more = np.array([_order(sequence) for sequence in sequences], np.uint64)
            hashes = np.unique(np.concatenate([hashes, more]))[: self.settings.most_proteins]
            self._proteins += len(sequences)
        if not len(hashes):
            raise CorpusError(
                f"{self.settings.corpus} has no held-out clusters to evaluate on; build it again "
                "with a larger --holdout-fraction."
            )
        self._last = int(hashes[-1])

    def _batches(self) -> Iterator[list[str]]:
        """All sequences that may be taken, some at a time."""
        for proteins in self._text.read(range(self._text.stretches)):
            yield decode_sequences(*proteins)

    def _sequences(self) -> Iterator[str]:
        """Those that are taken, each once."""
        seen = set()
        for sequences in self._batches():
            for sequence in sequences:
                order = _order(sequence)
                if order <= self._last and order not in seen:
                    seen.add(order)
                    yield sequence

    def files(self) -> Sequence[Path]:
        given, manifest = self.settings, self._manifest  # which has the digest of the rest
        return [file for file in (manifest, given.fasta, given.train_fasta, given.counts) if file]

    def baselines(self) -> Sequence[Subject]:
        grams = [ngram(order, *self._counts) for order in range(2, MOST_ORDER + 1)]
        return [uniform(), unigram(*self._counts), *grams]

    def requests(self, subject: Subject) -> Iterator[Request]:
        for sequence in self._sequences():
            yield Request(TRUE, sequence)
            yield Request(DRAWN, sequence)

    def measure(self, subject: Subject, readings: Readings) -> Outcome:
        rows = [_look_at(sequence, readings) for sequence in self._sequences()]
        found = _Found(*np.array(rows, np.float64).T)
        bucket = np.searchsorted(LENGTHS, found.length)
        by_length = {
            name: _ece(found.nats[bucket == i], found.chosen[bucket == i])
            for i, name in enumerate(bucket_names())
            if (bucket == i).any()
        }
        return Outcome(
            measures=self._measures(found, by_length),
            notes=[
                f"{len(rows):,} of {self._proteins:,} proteins, with {int(found.chosen.sum()):,} "
                f"chosen residues, {int(found.masked.sum()):,} of them shown as <mask>."
            ],
            figures=[_draw(by_length)],
        )

    def _measures(self, found: _Found, by_length: dict[str, Ratio]) -> list[Measure]:
        source = self.settings.corpus or self.settings.fasta
        assert source
        place = str(source).partition("?")[0] if is_uri(source) else Path(source).resolve()
        dataset = PurePosixPath(place).name.split(".")[0]

        def ece(metric: str, sample: Ratio, role: Role = "more") -> Measure:
            return Measure(metric, dataset, sample, higher_is_better=False, role=role)

        masked = found.masked
        return [
            ece("ece-masked", _ece(found.masked_nats, masked), "main"),
            ece("ece", _ece(found.nats, found.chosen)),
            Measure("accuracy", dataset, Ratio(found.right, masked)),
            *(ece(f"ece/{name}", sample) for name, sample in by_length.items()),
            ece("control/ece-masked", _ece(found.control_nats, masked), "control"),
            ece("chance/ece-masked", _ece(found.chance_nats, masked), "chance"),
        ]


def _sides(settings: PerplexitySettings) -> tuple[Text, Text | None]:
    """What is predicted, and what is counted unless that has been done."""
    if settings.corpus:
        corpus = Corpus.open(settings.corpus)
        asked = CorpusText.of(corpus, "heldout", "representatives")
        return asked, CorpusText.of(corpus, "train", settings.sampling)
    assert settings.fasta
    train = settings.train_fasta
    trained = FastaText.of([train], ReadingRules()) if train and not settings.counts else None
    return FastaText.of([settings.fasta], ReadingRules()), trained


def _manifest_here(where: Path | str, cache: Path) -> Path:
    """The file of a corpus's manifest on this machine."""
    files = CorpusFiles.at(where)
    if not files.is_far:
        return Path(files.where) / MANIFEST
    content = files.content(MANIFEST)
    copy = cache / f"corpus-{hashlib.sha256(content).hexdigest()[:16]}" / MANIFEST
    copy.parent.mkdir(parents=True, exist_ok=True)
    write_whole(copy, content.decode())
    return copy


def _order(sequence: str) -> int:
    """Where a protein stands in the order in which proteins are taken."""
    digest = hashlib.blake2b(sequence.encode(), digest_size=8, person=b"raptide.subset")
    return int.from_bytes(digest.digest(), "little")


def _look_at(sequence: str, readings: Readings) -> tuple[float, ...]:
    """The row of one protein in `_Found`."""
    chosen = choose_residues(sequence)
    masked = chosen.masked
    nats, right = readings.get(Request(TRUE, sequence)).astype(np.float64).T
    control, _ = readings.get(Request(DRAWN, sequence)).astype(np.float64).T
    return (
        len(sequence),
        len(masked),
        nats.sum(),
        masked.sum(),
        nats[masked].sum(),
        right[masked].sum(),
        control[masked].sum(),
        chosen.chance_nats[masked].sum(),
    )


def _ece(nats: np.ndarray, residues: np.ndarray) -> Ratio:
    return Ratio(nats, residues, exp=True)


def _draw(by_length: dict[str, Ratio]) -> Lines:
    names = bucket_names()
    values = [by_length[each].value() if each in by_length else np.nan for each in names]
    return Lines(
        title="ECE by length",
        x_label="residues",
        y_label="ECE",
        x=list(range(len(names))),
        series={"ECE": values},  # no name: equal weights under another one have the same result
        x_names=names,
    )
