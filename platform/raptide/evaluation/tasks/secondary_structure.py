"""Secondary structure of each residue, by probes on frozen embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from raptide.errors import InputError
from raptide.evaluation.datasets.chains import Chains
from raptide.evaluation.metrics.structure import (
    STATES,
    THREE_STATES,
    state_classes,
    three_state_scores,
)
from raptide.evaluation.probes import HIDDEN, Probe, Scale, Source, fit_probe, scale_of
from raptide.evaluation.requests import Reading, Readings, Request
from raptide.evaluation.results import Measure, Role
from raptide.evaluation.samples import Ratio
from raptide.evaluation.subjects.one_hot import OneHot
from raptide.evaluation.subjects.subject import Subject
from raptide.evaluation.tasks.layers import Layer, layers_of
from raptide.evaluation.tasks.task import Outcome, TaskSettings


class SecondaryStructureSettings(TaskSettings):
    """The fields of a `secondary-structure` task."""

    kind: Literal["secondary-structure"] = "secondary-structure"
    train: Path
    """Chains to learn from: `id`, `sequence`, `ss8`."""
    test: dict[str, Path] = Field(min_length=1)
    """Chains to be judged by, by the test's name."""
    layers: tuple[Layer, ...] = Field(("middle", "last"), min_length=1)
    """Of which the best on a validation share of the training chains is taken. A number counts from
    the front (0 is the embedding), or from the back if negative."""
    most_train: int | None = Field(None, ge=2)
    """Chains to learn from at most, drawn by a hash of the sequence; all if null."""


@dataclass
class _Tally:
    """Of each chain, residues that count and those that were told right."""

    counted: list[int] = field(default_factory=list)
    right: dict[str, list[int]] = field(default_factory=dict)

    def add(self, classes: np.ndarray, told: dict[str, np.ndarray]) -> None:
        """Classes [L], and by metric what was told of each, which may be of three states."""
        counts = classes >= 0
        self.counted.append(int(counts.sum()))
        for metric, answers in told.items():
            true = THREE_STATES[classes] if metric.endswith("q3") else classes
            hits = int((true == answers)[counts].sum())
            self.right.setdefault(metric, []).append(hits)

    def ratio(self, metric: str) -> Ratio:
        return Ratio(np.array(self.right[metric], float), np.array(self.counted, float))


class SecondaryStructure:
    """Q8 and Q3 of a linear and of a small two-layer probe."""

    version: ClassVar[int] = 1
    main_metric: ClassVar[str] = "q8"
    needs: ClassVar[tuple[str, ...]] = ("residues",)
    random_weights: ClassVar[bool] = True
    how: ClassVar[str] = (
        "Q8 and Q3: residues whose state a probe tells right, over all that count, in eight states "
        "(DSSP) or three (H, G, I are helix; E, B strand; the rest coil: its state is that of the "
        "largest sum of probabilities). `q8` and `q3` are of multinomial logistic regression on "
        f"the residues' frozen embeddings, `mlp-` of a network with {HIDDEN} hidden units. A tenth "
        "of the training chains, cut off by a hash of the sequence, chooses the layer (by the "
        "linear probe's Q8) and when training stops; the test set chooses nothing. Control: the "
        "linear probe learns from labels shuffled over all training residues, and must not beat "
        "the share of the commonest training state."
    )

    def __init__(self, settings: SecondaryStructureSettings) -> None:
        self.settings = settings
        self.train = Chains(settings.train, ("ss8",))
        self.tests = {name: Chains(path, ("ss8",)) for name, path in settings.test.items()}
        drawn = self.train.draw(np.arange(len(self.train)), settings.most_train)
        self.learned, self.valid = (places.tolist() for places in self.train.cut(drawn))
        """Places of the chains to learn from, and of the validation share."""
        self._counts = np.array([self._count(i) for i in (*self.learned, *self.valid)])
        if not self._counts[: len(self.learned)].any():
            raise InputError(
                f"{settings.train} needs two different sequences at least, with states that count, "
                "one to learn from and one for validation; add chains."
            )

    def files(self) -> Sequence[Path]:
        return (self.settings.train, *self.settings.test.values())

    def baselines(self) -> Sequence[Subject]:
        return (OneHot(),)

    def requests(self, subject: Subject) -> Iterator[Request]:
        layers = layers_of(subject, self.settings.layers)
        sources = [(self.train, [*self.learned, *self.valid])]
        sources += [(chains, [*range(len(chains))]) for chains in self.tests.values()]
        for chains, places in sources:
            for place in places:
                sequence = chains[place].sequence
                for layer in layers:
                    yield _request(layer, sequence)

    def measure(self, subject: Subject, readings: Readings) -> Outcome:
        probes: dict[int, tuple[Probe, Ratio]] = {}
        for layer in layers_of(subject, self.settings.layers):
            linear = self._fit(readings, layer)
            probes[layer] = linear, self._validate(readings, layer, linear)
        layer = max(probes, key=lambda each: (probes[each][1].value(), each))
        scale = probes[layer][0].scale
        fitted = {
            "": probes[layer][0],
            "mlp-": self._fit(readings, layer, hidden=HIDDEN, scale=scale),
            "control/": self._fit(readings, layer, scale=scale, classes=self._shuffled()),
        }
        shown = ", ".join(f"{at}: {ratio.value():.4f}" for at, (_, ratio) in probes.items())
        outcome = Outcome(notes=[f"Q8 on the validation share, by layer: {shown}.", *self._notes()])
        for name, chains in self.tests.items():
            outcome.measures += self._judge(name, chains, readings, layer, fitted)
        return outcome

    def _fit(
        self,
        readings: Readings,
        layer: int,
        hidden: int = 0,
        scale: Scale | None = None,
        classes: Callable[[int], np.ndarray] | None = None,
    ) -> Probe:
        classes_of = classes or self._classes

        def get(place: int) -> tuple[np.ndarray, np.ndarray]:
            sequence = self.train[place].sequence
            return readings.get(_request(layer, sequence)), classes_of(place)

        rows = self._counts.sum(axis=1)
        train = Source(self.learned, int(rows[: len(self.learned)].sum()), get)
        valid = Source(self.valid, int(rows[len(self.learned) :].sum()), get)
        return fit_probe(train, valid, len(STATES), hidden=hidden, scale=scale or scale_of(train))

    def _classes(self, place: int) -> np.ndarray:
        return state_classes(self.train[place].ss8)

    def _count(self, place: int) -> np.ndarray:
        classes = self._classes(place)
        return np.bincount(classes[classes >= 0], minlength=len(STATES))

    def _shuffled(self) -> Callable[[int], np.ndarray]:
        """Classes of training chains after all their labels were shuffled, those that count.

        Which labels a chain gets is drawn without replacement from what is left; 64 bytes a chain
        are held.
        """
        rng = np.random.default_rng(0)
        left = self._counts.sum(axis=0)
        labels: dict[int, np.ndarray] = {}
        for place, own in zip((*self.learned, *self.valid), self._counts, strict=True):
            labels[place] = rng.multivariate_hypergeometric(left, own.sum())
            left = left - labels[place]

        def classes(place: int) -> np.ndarray:
            shuffled = self._classes(place)
            drawn = np.repeat(np.arange(len(STATES)), labels[place])
            order = np.random.default_rng(int(self.train.hashes[place])).permutation(len(drawn))
            shuffled[shuffled >= 0] = drawn[order]
            return shuffled

        return classes

    def _validate(self, readings: Readings, layer: int, probe: Probe) -> Ratio:
        tally = _Tally()
        for place in self.valid:
            features = readings.get(_request(layer, self.train[place].sequence))
            tally.add(self._classes(place), {"q8": probe.probabilities(features).argmax(-1)})
        return tally.ratio("q8")

    def _judge(
        self,
        name: str,
        chains: Chains,
        readings: Readings,
        layer: int,
        fitted: dict[str, Probe],
    ) -> list[Measure]:
        tally = _Tally()
        commonest = int(self._counts[: len(self.learned)].sum(axis=0).argmax())
        for chain in chains:
            features = readings.get(_request(layer, chain.sequence))
            told = {"chance/q8": np.full(len(chain.sequence), commonest)}
            for prefix, probe in fitted.items():
                probabilities = probe.probabilities(features)
                told[f"{prefix}q8"] = probabilities.argmax(-1)
                told[f"{prefix}q3"] = three_state_scores(probabilities).argmax(-1)
            told.pop("control/q3")
            tally.add(state_classes(chain.ss8), told)
        roles: dict[str, Role] = {"q8": "main", "control/q8": "control", "chance/q8": "chance"}
        order = sorted(tally.right, key=lambda metric: (metric in roles) and metric != "q8")
        return [
            Measure(metric, name, tally.ratio(metric), role=roles.get(metric, "more"), layer=layer)
            for metric in order
        ]

    def _notes(self) -> Iterator[str]:
        yield (
            f"Learned from {len(self.learned):,} chains; {len(self.valid):,} for validation chose "
            "the layer and the end of training."
        )
        learned = self.train.hashes[[*self.learned, *self.valid]]
        for name, chains in self.tests.items():
            known = int(np.isin(chains.hashes, learned).sum())
            if known:
                yield (
                    f"{name}: {known:,} of {len(chains):,} sequences are among those learned from; "
                    "its numbers are too good."
                )
            states = sum(chain.ss8.count("-") for chain in chains)
            if states:
                yield f"{name}: {states:,} residues without a state do not count."


def _request(layer: int, sequence: str) -> Request:
    return Request(Reading("residues", layer), sequence)
