"""Two ways of having items computed: by a bulk job on Ray, or in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import ray

from raptide.bulk.folder import REJECTS_FILE, OutputFolder
from raptide.bulk.job import Watch, fingerprint, run_bulk, survey_sources
from raptide.bulk.places import BulkSettings
from raptide.bulk.work import Model, Precision
from raptide.errors import RaptideError
from raptide.evaluation.subjects.items import Item
from raptide.evaluation.subjects.source import ItemFile, write_items
from raptide.evaluation.subjects.work import Head, ReadWork, fit_head

ITEMS, OUTPUT = "items.parquet", "bulk"

Bar = Callable[[], AbstractContextManager[Watch]]


class Reader(Protocol):
    """Has items computed."""

    def fit(self, model: Model, precision: Precision, examples: Sequence[Any]) -> Head:
        """A contact regression on sequences with their contact maps."""

    def compute(self, work: ReadWork, items: Sequence[Item], folder: Path) -> Iterator[np.ndarray]:
        """Numbers of all items in turn, those of one or of several at once.

        Args:
            folder: of one's own for scratch; what lies there of a killed call is gone on with.
        """


@dataclass(frozen=True)
class BulkReader:
    """By a bulk job: on all engines there is room for, resumed where it was killed."""

    settings: BulkSettings = field(default_factory=BulkSettings)
    bar: Bar = lambda: nullcontext(lambda done, total, rate: None)

    def fit(self, model: Model, precision: Precision, examples: Sequence[Any]) -> Head:
        gpus = 1 if ray.cluster_resources().get("GPU", 0) else 0
        task = ray.remote(num_cpus=1 - gpus, num_gpus=gpus)(fit_head)
        return ray.get(task.remote(model, precision, self.settings.threads, examples))

    def compute(self, work: ReadWork, items: Sequence[Item], folder: Path) -> Iterator[np.ndarray]:
        write_items(folder / ITEMS, items, work.model.width)
        output = OutputFolder.at(folder / OUTPUT)
        settings = self.settings.model_copy(update={"replace": self._is_of_another(work, folder)})
        source = ItemFile(str(folder / ITEMS))
        with self.bar() as watch:
            outcome = run_bulk(work, [source], output, settings, watch)
        if outcome.rejects:
            reason = output.read_table(REJECTS_FILE)["reason"][0]
            raise RaptideError(
                f"{outcome.rejects} proteins could not be computed by {work.model.path} "
                f"({reason}); leave them out, or give engines more memory."
            )
        for name in output.parts():
            for batch in output.read_part(name, ["values"]).to_batches():
                yield batch["values"].flatten().to_numpy()

    def _is_of_another(self, work: ReadWork, folder: Path) -> bool:
        """Whether what lies there is of other items, or of other work."""
        manifest = OutputFolder.at(folder / OUTPUT).manifest()
        if manifest is None:
            return False
        (survey,) = survey_sources([ItemFile(str(folder / ITEMS))], work)
        known = fingerprint(work, self.settings) | {"inputs": [survey.digest]}
        return any(manifest["fingerprint"].get(name, known[name]) != known[name] for name in known)


@dataclass(frozen=True)
class HereReader:
    """In this process, one batch after the other: beside a training, or for a few proteins."""

    threads: int = 1

    def fit(self, model: Model, precision: Precision, examples: Sequence[Any]) -> Head:
        return fit_head(model, precision, self.threads, examples)

    def compute(self, work: ReadWork, items: Sequence[Item], folder: Path) -> Iterator[np.ndarray]:
        compute = work.open(self.threads)
        texts = [item.write() for item in items]
        for start in range(0, len(texts), 1024):  # answers come in order, so they wait in memory
            some = texts[start : start + 1024]
            found: dict[int, Any] = {}
            for places in work.slices(some, 1 << 16):
                found.update(zip(places, compute([some[i] for i in places]), strict=True))
            yield from (found[index] for index in range(len(some)))
