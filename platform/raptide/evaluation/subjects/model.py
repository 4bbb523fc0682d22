"""Models as subjects: trained ones, and one of the same shape with random weights."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from raptide.bulk.work import Model, Precision
from raptide.errors import ConfigError, InputError, RaptideError
from raptide.evaluation.requests import Kind, Readings
from raptide.evaluation.subjects.items import Item, gather
from raptide.evaluation.subjects.readers import Reader
from raptide.evaluation.subjects.store import Store, write_values
from raptide.evaluation.subjects.subject import Ask
from raptide.evaluation.subjects.work import ReadWork
from raptide.patience import reason_of

ANSWERS: frozenset[Kind] = frozenset(
    ("residues", "mean", "sites", "contacts", "masked", "marginals", "pseudo", "letters")
)
WITHOUT_HEAD: frozenset[Kind] = frozenset(("residues", "mean", "sites", "contacts"))
OF_BLIND: frozenset[Kind] = ANSWERS - {"contacts", "pseudo"}
"""Of models that read neither `<mask>` nor have attention maps."""

RANDOM_SEED = 0
"""Of random weights."""

Fits = Mapping[str, Sequence[tuple[str, np.ndarray]]]
"""What contact regressions are fitted on, by the method of the readings that use them."""


@dataclass
class ModelSubject:
    """A model on disk."""

    name: str
    model: Model
    precision: Precision
    reader: Reader
    scratch: Path
    """A folder of this subject's own; gone after reading."""
    fits: Fits = field(default_factory=dict)
    baseline: bool = False
    say: Callable[[str], None] = lambda line: None
    """Told what room the answers take, before anything is computed."""

    @property
    def digest(self) -> str:
        return hashlib.sha256(f"{self.model.digest} {self.precision}".encode()).hexdigest()

    @property
    def layers(self) -> int:
        return self.model.layers

    @property
    def kinds(self) -> frozenset[Kind]:
        if self.model.blind:
            return OF_BLIND
        return ANSWERS if self.model.has_head else WITHOUT_HEAD

    def lineage(self) -> dict[str, Any]:
        """Where the weights come from, as the bundle's raptide.json says; {} for strangers'."""
        from raptide.model.formats.bundle import LINEAGE

        file = Path(self.model.path) / LINEAGE
        return json.loads(file.read_text()) if file.is_file() else {}

    @contextmanager
    def read(self, ask: Ask) -> Iterator[Readings]:
        """Read all that is asked; each protein passes the model once.

        Raises:
            ConfigError: the disk has no room for the answers.
            InputError: contacts are asked of longer sequences than the model takes, or its answers
                are no numbers.
            RaptideError: the answers cannot be written.
        """
        items = gather(ask())
        self._refuse_long(items)
        values = self.scratch / "values.f32"
        try:
            self.scratch.mkdir(parents=True, exist_ok=True)
            self._refuse_small_disk(items)
            self._compute(items, values)
        except OSError as error:
            raise RaptideError(
                f"Answers of {self.name} cannot be kept in {self.scratch} ({reason_of(error)}); "
                "make room or give another --cache, and start again: it goes on where it was."
            ) from None
        yield Store(values, items, self.model.width)
        shutil.rmtree(self.scratch, ignore_errors=True)

    def _compute(self, items: Sequence[Item], values: Path) -> None:
        heads = {
            method: self.reader.fit(self.model, self.precision, self.fits[method])
            for method in sorted(_contact_methods(items))
        }
        work = ReadWork(self.model, self.precision, heads)
        if items:
            answers = self.reader.compute(work, items, self.scratch)
            write_values(values, self._numbers(answers))
        shutil.rmtree(self.scratch / "bulk", ignore_errors=True)

    def _numbers(self, answers: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """The same; no probe or ranking shows that what it was given were no numbers."""
        for some in answers:
            if not np.isfinite(some).all():
                raise InputError(
                    f"{self.name} answers with NaN or infinity, as weights do that have diverged; "
                    "name an earlier checkpoint."
                )
            yield some

    def _refuse_long(self, items: Sequence[Item]) -> None:
        """Attention maps are of whole sequences."""
        methods = _contact_methods(items)
        asked = [len(item.sequence) for item in items if _contact_methods([item])]
        asked += [len(sequence) for method in methods for sequence, _ in self.fits[method]]
        longest, most = max(asked, default=0), self.model.max_residues
        if longest > most:
            raise InputError(
                f"Contacts are read off whole sequences, of which {self.name} takes {most:,} "
                f"residues at most, but one has {longest:,}; give the task `most_residues: {most}`."
            )

    def scratch_bytes(self, items: Sequence[Item]) -> int:
        """Room that answers take while they are read: as parts of a job, and as one file."""
        return 2 * 4 * sum(item.floats(self.model.width) for item in items)

    def _refuse_small_disk(self, items: Sequence[Item]) -> None:
        need, free = self.scratch_bytes(items), shutil.disk_usage(self.scratch).free
        self.say(f"{self.name}: answers take {need / 1e9:.2f} GB in {self.scratch} for a while")
        if need > free:
            raise ConfigError(
                f"Answers of {self.name} take {need / 1e9:.1f} GB in {self.scratch}, which has "
                f"{free / 1e9:.1f} GB free; give another --cache, or fewer --tasks or layers."
            )


def _contact_methods(items: Sequence[Item]) -> set[str]:
    return {r.method for item in items for r, _ in item.wants if r.kind == "contacts"}


def random_weights(like: ModelSubject, scratch: Path) -> ModelSubject:
    """A model of the same shape that has learned nothing."""
    from raptide.model.families import make_model
    from raptide.model.formats.detect import read_weights, write_weights
    from raptide.model.formats.weights import Weights

    settings = read_weights(like.model.path).settings
    facts = json.dumps(settings.model_dump(), sort_keys=True)
    name = hashlib.sha256(f"{facts} {RANDOM_SEED}".encode()).hexdigest()[:16]
    folder = scratch / f"random-{name}"
    if not folder.exists():
        # Another process may make the same: each writes its own, and the first one's stays.
        partial = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}")
        try:
            write_weights(partial, Weights.of(make_model(settings).initialise(RANDOM_SEED)))
            try:
                partial.rename(folder)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return ModelSubject(
        *("random-weights", Model.find(folder), like.precision, like.reader),
        *(scratch / f"read-{name}-{like.precision}", like.fits, True, like.say),
    )
