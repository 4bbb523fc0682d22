"""Contacts between residues: as a subject scores pairs by itself, and by a probe on its vectors."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from raptide.errors import InputError
from raptide.evaluation.datasets.chains import Chain, Chains
from raptide.evaluation.metrics.structure import (
    BANDS,
    CUTS,
    band_pairs,
    chance_precision,
    precision_curve,
    summary,
)
from raptide.evaluation.probes import (
    PairProbe,
    Pairs,
    PairSource,
    draw_pairs,
    fit_pair_probe,
)
from raptide.evaluation.requests import Reading, Readings, Request
from raptide.evaluation.results import Figure, Heatmap, Lines, Measure, Role
from raptide.evaluation.samples import mean_of
from raptide.evaluation.subjects.separation import Separation
from raptide.evaluation.subjects.subject import Subject
from raptide.evaluation.tasks.layers import Layer, layers_of
from raptide.evaluation.tasks.task import Outcome, TaskSettings
from raptide.inference.contact_fit import MIN_SEPARATION, contact_map

MOST_FIT_RESIDUES = 400
"""Of a chain that the unsupervised regression is fitted on: it holds maps of all heads."""
LEAST_RESOLVED = 0.9
"""Share of its residues that are resolved."""

DRAWN_CHAINS = 3
"""Whose maps are drawn."""
DRAWN_RESIDUES = (60, 250)

Scorer = Callable[[Chain], np.ndarray]
"""A chain's pairs as scores, symmetric [L, L]."""


class ContactsSettings(TaskSettings):
    """The fields of a `contacts` task."""

    kind: Literal["contacts"] = "contacts"
    train: Path
    """Chains to learn from: `id`, `sequence`, `cb_angstrom`."""
    test: dict[str, Path] | Path
    """Chains to be judged by, by the test's name, which is the file's stem where there is none."""
    chains: int = Field(20, ge=1)
    """Of the training chains, how many the unsupervised regression is fitted on."""
    layers: tuple[Layer, ...] = Field(("middle", "last"), min_length=1)
    """Of which the probe takes the best on a validation share of its chains. A number counts
    from the front (0 is the embedding), or from the back if negative."""
    most_train: int = Field(2500, ge=2)
    """Chains that the probe learns from at most, drawn by a hash of the sequence."""
    most_residues: int = Field(1022, ge=1)
    """Longer chains are left out, and counted."""


@dataclass
class _Tally:
    """What was found of each chain of one test, by the prefix of what scored it."""

    curves: dict[tuple[str, str], list[np.ndarray]] = field(default_factory=dict)
    """Precision at the tenths of L, by prefix and band."""
    controls: dict[str, list[float]] = field(default_factory=dict)
    """Long-range precision at L where the contacts are shuffled."""
    chance: list[float] = field(default_factory=list)

    def add(
        self,
        contacts: np.ndarray,
        scores: dict[str, np.ndarray],
        controls: dict[str, np.ndarray],
        seed: int,
    ) -> None:
        """One chain: its map, and scores of its pairs, all [L, L]."""
        length = len(contacts)
        for band in BANDS:
            i, j = band_pairs(contacts, band)
            for prefix, each in scores.items():
                curve = precision_curve(each[i, j], contacts[i, j], length)
                self.curves.setdefault((prefix, band), []).append(curve)
        i, j = band_pairs(contacts, "long")
        self.chance.append(chance_precision(contacts[i, j], length))
        shuffled = np.random.default_rng(seed).permutation(contacts[i, j])
        for prefix, each in controls.items():
            precision = precision_curve(each[i, j], shuffled, length)[-1]
            self.controls.setdefault(prefix, []).append(float(precision))

    def measures(self, dataset: str, layers: dict[str, int | None]) -> Iterator[Measure]:
        for (prefix, band), curves in self.curves.items():
            rows = [summary(curve) for curve in curves]
            for cut in rows[0]:
                metric = f"{prefix}{cut}/{band}"
                role: Role = "main" if metric == Contacts.main_metric else "more"
                sample = mean_of([row[cut] for row in rows])
                yield Measure(metric, dataset, sample, role=role, layer=layers[prefix])
        for prefix, values in self.controls.items():
            metric = f"{prefix}p@l/long"
            for name, found in (("control", values), ("chance", self.chance)):
                role = "control" if name == "control" else "chance"
                sample = mean_of(found)
                yield Measure(f"{name}/{metric}", dataset, sample, role=role, layer=layers[prefix])

    def figure(self, dataset: str, prefix: str) -> Lines:
        of = "probed" if prefix else "unsupervised"
        means = {band: self.curves[prefix, band] for band in reversed(BANDS)}
        return Lines(
            title=f"Contacts, {of}, {dataset}: precision by how many pairs are taken",
            x_label="pairs taken, as a share of the sequence's length",
            y_label="precision",
            x=[tenth / CUTS for tenth in range(1, CUTS + 1)],
            series={
                band: [mean_of(column).value() for column in np.transpose(curves)]
                for band, curves in means.items()
            },
        )


class Contacts:
    """Precision of the likeliest pairs, unsupervised and probed.

    Subjects that score pairs after a fit, as the engine does with its attention maps, fit on
    `fit_on`; readings carry which fit it is.
    """

    version: ClassVar[int] = 1
    main_metric: ClassVar[str] = "p@l/long"
    needs: ClassVar[tuple[str, ...]] = ("contacts|residues",)
    random_weights: ClassVar[bool] = True
    how: ClassVar[str] = (
        "Two residues touch if their Cβ (glycine: Cα) are less than 8 Å apart. `p@l/long` is the "
        "share of true contacts among the L likeliest pairs at least 24 apart in a sequence of L "
        "residues, `p@l/2` and `p@l/5` among fewer, `p@mean` the mean over L/10, 2L/10, …, L; "
        "`medium` is [12, 24), `short` [6, 12), `near` [3, 6) apart; means over chains. As in "
        "facebookresearch/esm, examples/contact_prediction.ipynb: pairs with an unresolved end are "
        "left out, and where a band has fewer pairs than are taken, those that lack are misses. "
        "Unsupervised: sparse logistic regression on attention maps with average product "
        "correction, fitted on a few training chains (Rao et al., 2021). Probed (`probe-`): "
        "logistic regression on products and sums of the frozen embeddings of two residues, "
        "learned from pairs 6 or more apart of the training chains, a share of the pairs that do "
        "not touch; a tenth of the chains chooses the layer. Control: contacts shuffled among the "
        "long-range pairs of each chain, for the probe while it learns as well (within each band); "
        "precision is then the density of contacts, whatever scores them."
    )

    def __init__(self, settings: ContactsSettings) -> None:
        self.settings = settings
        test = settings.test
        self._paths = test if isinstance(test, dict) else {test.stem: test}
        self.train = Chains(settings.train, ("cb_angstrom",))
        self.tests = {name: Chains(path, ("cb_angstrom",)) for name, path in self._paths.items()}
        drawn = self.train.draw(self._fitting(self.train), settings.most_train)
        self.learned, self.valid = (places.tolist() for places in self.train.cut(drawn))
        """Places of the chains that the probe learns from, and of the validation share."""
        if not any(self._resolved(place) for place in self.learned):
            raise InputError(
                f"{settings.train} needs two different sequences at least of {MIN_SEPARATION + 1} "
                f"to {settings.most_residues} residues, resolved at both ends, one to learn from "
                "and one for validation; add chains."
            )

    def files(self) -> Sequence[Path]:
        return (self.settings.train, *self._paths.values())

    def baselines(self) -> Sequence[Subject]:
        places = self._fitting(self.train)
        return (Separation(contact_map(self.train[place].cb_angstrom) for place in places),)

    @cached_property
    def fit_on(self) -> list[tuple[str, np.ndarray]]:
        """Training chains for the unsupervised regression: sequences and maps [L, L]."""
        lengths = self.train.lengths
        short = np.flatnonzero(lengths <= min(MOST_FIT_RESIDUES, self.settings.most_residues))
        found: list[tuple[str, np.ndarray]] = []
        for place in short[np.argsort(self.train.hashes[short], kind="stable")]:
            chain: Chain = self.train[place]
            resolved = ~np.isnan(chain.cb_angstrom).any(axis=1)
            if resolved.mean() >= LEAST_RESOLVED:
                found.append((chain.sequence, contact_map(chain.cb_angstrom)))
            if len(found) == self.settings.chains:
                break
        return found

    @cached_property
    def fit_digest(self) -> str:
        """12 hex digits that stand for `fit_on`."""
        digest = hashlib.blake2b(digest_size=6)
        for sequence, contacts in self.fit_on:
            digest.update(sequence.encode() + contacts.tobytes())
        return digest.hexdigest()

    def requests(self, subject: Subject) -> Iterator[Request]:
        scored, probed = "contacts" in subject.kinds, "residues" in subject.kinds
        layers = layers_of(subject, self.settings.layers) if probed else ()
        for place in (*self.learned, *self.valid) if probed else ():
            sequence = self.train[place].sequence
            yield from (_vectors(layer, sequence) for layer in layers)
        for chains in self.tests.values():
            for place in self._fitting(chains):
                sequence = chains[place].sequence
                yield from (_vectors(layer, sequence) for layer in layers)
                if scored:
                    yield self._scores(sequence)

    def measure(self, subject: Subject, readings: Readings) -> Outcome:
        outcome = Outcome(notes=[*self._notes()])
        scorers: dict[str, Scorer] = {}
        controls: dict[str, Scorer] = {}
        layers: dict[str, int | None] = {"": None}
        if "contacts" in subject.kinds:
            scorers[""] = controls[""] = lambda chain: readings.get(self._scores(chain.sequence))
        if "residues" in subject.kinds:
            layer, probe, note = self._choose(layers_of(subject, self.settings.layers), readings)
            control = self._fit(readings, layer, cache(partial(self._pairs, shuffled=True)))
            scorers["probe-"] = _by_probe(readings, layer, probe)
            controls["probe-"] = _by_probe(readings, layer, control)
            layers["probe-"] = layer
            outcome.notes.append(note)
        for name, chains in self.tests.items():
            tally = _Tally()
            for place in self._fitting(chains):
                chain = chains[place]
                tally.add(
                    contact_map(chain.cb_angstrom),
                    {prefix: scorer(chain) for prefix, scorer in scorers.items()},
                    {prefix: scorer(chain) for prefix, scorer in controls.items()},
                    seed=int(chains.hashes[place]),
                )
            outcome.measures += tally.measures(name, layers)
            outcome.figures += [tally.figure(name, prefix) for prefix in scorers]
        outcome.figures += self._maps(next(iter(scorers.values())))
        return outcome

    def _choose(self, layers: Sequence[int], readings: Readings) -> tuple[int, PairProbe, str]:
        """The best layer on the validation share, its probe, and a note; of equal ones the last."""
        pairs = cache(partial(self._pairs, shuffled=False))
        probes = {layer: self._fit(readings, layer, pairs) for layer in layers}
        found = {}
        for layer, probe in probes.items():
            score = _by_probe(readings, layer, probe)
            curves = []
            for place in self.valid:
                chain = self.train[place]
                contacts = contact_map(chain.cb_angstrom)
                i, j = band_pairs(contacts, "long")
                scores = score(chain)[i, j]
                curves.append(precision_curve(scores, contacts[i, j], len(contacts))[-1])
            found[layer] = mean_of(curves).value()
        layer = max(layers, key=lambda each: (np.nan_to_num(found[each], nan=-1.0), each))
        shown = ", ".join(f"{at}: {value:.4f}" for at, value in found.items())
        return layer, probes[layer], f"Probe, p@l/long on the validation share, by layer: {shown}."

    def _fit(self, readings: Readings, layer: int, pairs: Callable[[int], Pairs]) -> PairProbe:
        def vectors(place: int) -> np.ndarray:
            return readings.get(_vectors(layer, self.train[place].sequence))

        train, valid = (PairSource(each, vectors, pairs) for each in (self.learned, self.valid))
        return fit_pair_probe(train, valid)

    def _pairs(self, place: int, shuffled: bool) -> Pairs:
        """What the probe learns from of one training chain."""
        contacts = contact_map(self.train[place].cb_angstrom)
        seed = int(self.train.hashes[place])
        rng = np.random.default_rng(seed)
        taken = []
        for band, (least, _) in BANDS.items():
            if least < MIN_SEPARATION:
                continue
            i, j = band_pairs(contacts, band)
            touching = contacts[i, j].astype(np.int64)
            taken.append((i, j, rng.permutation(touching) if shuffled else touching))
        return draw_pairs(Pairs(*map(np.concatenate, zip(*taken, strict=True))), seed)

    def _maps(self, scorer: Scorer) -> Iterator[Figure]:
        """Maps of a few chains of the first test."""
        chains = next(iter(self.tests.values()))
        fitting = self._fitting(chains)
        least, most = DRAWN_RESIDUES
        lengths = chains.lengths[fitting]
        handy = fitting[(lengths >= least) & (lengths <= most)]
        for place in chains.draw(handy if len(handy) else fitting, DRAWN_CHAINS):
            chain = chains[place]
            truth = contact_map(chain.cb_angstrom)
            yield Heatmap(f"Contacts of {chain.id}", scorer(chain), truth=truth)

    def _resolved(self, place: int) -> bool:
        """Whether a training chain has pairs to learn from."""
        resolved = np.flatnonzero(~np.isnan(self.train[place].cb_angstrom).any(axis=1))
        return len(resolved) > 0 and bool(resolved[-1] - resolved[0] >= MIN_SEPARATION)

    def _fitting(self, chains: Chains) -> np.ndarray:
        return np.flatnonzero(chains.lengths <= self.settings.most_residues)

    def _scores(self, sequence: str) -> Request:
        return Request(Reading("contacts", method=self.fit_digest), sequence)

    def _notes(self) -> Iterator[str]:
        for name, chains in (("The training chains", self.train), *self.tests.items()):
            long = len(chains) - len(self._fitting(chains))
            if long:
                yield (
                    f"{name}: {long:,} of {len(chains):,} chains have more than "
                    f"{self.settings.most_residues:,} residues and are left out."
                )
        for name, chains in self.tests.items():
            known = int(np.isin(chains.hashes, self.train.hashes).sum())
            if known:
                yield (
                    f"{name}: {known:,} of {len(chains):,} sequences are among the training "
                    "chains; its numbers are too good."
                )


def _by_probe(readings: Readings, layer: int, probe: PairProbe) -> Scorer:
    return lambda chain: probe.scores(readings.get(_vectors(layer, chain.sequence)))


def _vectors(layer: int, sequence: str) -> Request:
    return Request(Reading("residues", layer), sequence)
