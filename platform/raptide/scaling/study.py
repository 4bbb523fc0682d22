"""Study files: which runs make a study.

name: miniature
recipe: ../swissprot.yaml              # what all runs share; relative to this file
settings: {training: {steps: 500}}     # sections of the recipe that differ in the whole study
models:                                # sections that differ by model; `model` is given whole
  t-0.2M: {model: {family: esm2, layers: 4, width: 64, heads: 4}}
data:                                  # and by data
  1pct: {stream: {fraction: 0.01}}
grid:                                  # every model on all data with every seed; parts add up
  - {models: [t-0.2M], data: [1pct], seeds: [1, 2, 3]}
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from raptide.config import Settings, load_settings, merge, read_tree, settle
from raptide.training.planning.recipe import Recipe

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
"""What models and data may be called: runs' folders are."""


class GridSettings(Settings):
    """A part of the grid."""

    models: tuple[str, ...] = Field(min_length=1)
    data: tuple[str, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field((1,), min_length=1)
    """Of weights and stream. Where a model on the same data has several, they are its noise."""


class StudySettings(Settings):
    """One scaling study."""

    name: str
    recipe: str
    """File of the recipe, relative to this one."""

    settings: dict[str, Any] = Field(default_factory=dict)
    """Sections of a recipe that go on top of it in every run."""

    models: dict[str, dict[str, Any]] = Field(min_length=1)
    """The same by model: `model`, which takes the place of the recipe's as a whole, and what suits
    that size (a rate, micro-batches, workers)."""

    data: dict[str, dict[str, Any]] = Field(min_length=1)
    """The same by data: `stream` with a fraction or a sampling, or another `corpus`."""

    grid: tuple[GridSettings, ...] = Field(min_length=1)

    benchmark: str | None = None
    """A benchmark that every trained model is asked besides its perplexity; relative to this
    file."""

    tasks: tuple[str, ...] = ()
    """Names or kinds of the benchmark's tasks; none takes all."""

    heldout_corpus: str | None = None
    """Corpus whose held-out proteins all models and n-grams are measured on; None takes that of
    the first run."""

    heldout_proteins: int = Field(1000, ge=2)

    ngrams: bool = True
    """Count n-grams on each of the data, too."""

    at_once: int | None = Field(None, ge=1)
    """Runs that train side by side; None takes as many as the cluster has room for."""

    worker_tflops: float | None = Field(None, gt=0.0)
    """What one worker keeps up, in 10^12 operations a second, for the time in the dry run."""

    @field_validator("models", "data")
    @classmethod
    def _names_can_be_folders(cls, named: dict[str, Any]) -> dict[str, Any]:
        for name in named:
            if not NAME.fullmatch(name):
                raise ValueError(
                    f"names are of letters, digits, '.', '_' and '-', since folders are called by "
                    f"them, but one is {name!r}"
                )
        return named

    @model_validator(mode="after")
    def _grid_names_what_there_is(self) -> StudySettings:
        for part in self.grid:
            for kind, asked in (("models", part.models), ("data", part.data)):
                for name in asked:
                    if name not in getattr(self, kind):
                        known = ", ".join(getattr(self, kind))
                        raise ValueError(
                            f"the grid names {name!r} under {kind}, of which there are {known}"
                        )
        return self


@dataclass(frozen=True)
class PlannedRun:
    """One run of a study."""

    model: str
    data: str
    seed: int
    recipe: Recipe

    @property
    def name(self) -> str:
        return run_name(self.model, self.data, self.seed)


def run_name(model: str, data: str, seed: int) -> str:
    return f"{model}--{data}--seed{seed}"


@dataclass(frozen=True)
class Study:
    """A study file with the recipes of all its runs."""

    settings: StudySettings
    runs: tuple[PlannedRun, ...]
    benchmark: Path | None

    @property
    def heldout_corpus(self) -> str:
        return self.settings.heldout_corpus or self.runs[0].recipe.corpus[0].path

    @classmethod
    def load(cls, path: Path, overrides: Iterable[str] = ()) -> Study:
        """Read a study file.

        Args:
            overrides: `section.field=value`, on top of the recipe of every run.

        Raises:
            ConfigError: a file is unreadable, or a recipe that comes of it is wrong.
        """
        settings = load_settings(StudySettings, path)
        below = merge(read_tree(path.parent / settings.recipe), settings.settings)
        overrides = list(overrides)
        triples = dict.fromkeys(
            triple
            for part in settings.grid
            for triple in product(part.models, part.data, part.seeds)
        )
        runs = tuple(
            _plan(settings, below, overrides, triple, f"{path}, {run_name(*triple)}")
            for triple in triples
        )
        benchmark = path.parent / settings.benchmark if settings.benchmark else None
        return cls(settings, runs, benchmark)


def _plan(
    study: StudySettings,
    below: dict[str, Any],
    overrides: list[str],
    triple: tuple[str, str, int],
    source: str,
) -> PlannedRun:
    model, data, seed = triple
    tree = below
    for part in (study.models[model], study.data[data], _seeded(seed)):
        if "model" in part:  # families do not share their fields
            tree = {name: value for name, value in tree.items() if name != "model"}
        tree = merge(tree, part)
    tree = merge(tree, {"name": f"{study.name}-{run_name(model, data, seed)}"})
    recipe = settle(Recipe, copy.deepcopy(tree), overrides, source=source)
    return PlannedRun(model, data, seed, recipe)


def _seeded(seed: int) -> dict[str, Any]:
    return {"training": {"seed": seed}, "stream": {"seed": seed}}
