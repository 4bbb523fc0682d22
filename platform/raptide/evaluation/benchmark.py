"""Benchmark files: a name and a list of tasks, with paths relative to the file.

name: tiny
tasks:
  - kind: secondary-structure
    train: chains_train.parquet
    test: {chains: chains_test.parquet}
"""

from __future__ import annotations

import glob
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from raptide.config import Settings, load_settings, parse_settings
from raptide.errors import ConfigError
from raptide.evaluation.tasks import KINDS, make_task
from raptide.evaluation.tasks.task import Task, TaskSettings
from raptide.storage import is_uri

PATHS = {
    *("corpus", "fasta", "train_fasta", "train", "test"),
    *("domains", "assays", "reference"),
}
"""Fields of any task that hold paths, or names of paths."""


class BenchmarkSettings(Settings):
    """What stands in a benchmark file."""

    name: str
    tasks: list[dict[str, Any]] = Field(min_length=1)


@dataclass(frozen=True)
class Benchmark:
    """Tasks under a name."""

    name: str
    tasks: tuple[TaskSettings, ...]
    """With absolute paths, each under a name of its own."""

    @classmethod
    def load(cls, path: str | Path, only: list[str] | None = None) -> Benchmark:
        """Read a benchmark file.

        Args:
            only: names or kinds of tasks; the others are left out.

        Raises:
            ConfigError: the file does not hold a benchmark, or has no task of that name.
        """
        whole = load_settings(BenchmarkSettings, path)
        base = Path(path).resolve().parent
        tasks = tuple(_task(tree, base, f"{path}, task {i}") for i, tree in enumerate(whole.tasks))
        names = [task.name for task in tasks]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(
                    f"{path} has {names.count(name)} tasks called {name!r}; give each a `name:` of "
                    "its own."
                )
        return cls(whole.name, _choose(tasks, only, path))

    def make(self, scratch: Path) -> list[Task]:
        """The tasks with their data, checked.

        Args:
            scratch: where what is made of data alone is kept, by the data's digests.

        Raises:
            InputError: a file is missing or does not hold what the task needs.
        """
        return [make_task(settings, scratch) for settings in self.tasks]


def _task(tree: dict[str, Any], base: Path, place: str) -> TaskSettings:
    kind = tree.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        known = ", ".join(KINDS)
        raise ConfigError(f"{place} has kind {kind!r}; give one of {known}.")
    located = {
        key: _locate(value, _pattern(base) if key == "assays" else base) if key in PATHS else value
        for key, value in ({"name": kind} | tree).items()
    }
    return parse_settings(KINDS[kind][0], located, source=place)


def _pattern(folder: Path) -> Path:
    """A folder in a glob, whatever it is called."""
    return Path(glob.escape(str(folder)))


def _locate(value: Any, base: Path) -> Any:
    if isinstance(value, dict):
        return {name: _locate(each, base) for name, each in value.items()}
    return str(base / value) if isinstance(value, str) and not is_uri(value) else value


def _choose(
    tasks: tuple[TaskSettings, ...], only: list[str] | None, path: str | Path
) -> tuple[TaskSettings, ...]:
    for asked in only or []:
        if not any(asked in (task.name, task.kind) for task in tasks):
            known = ", ".join(task.name for task in tasks)
            raise ConfigError(f"{path} has no task {asked!r}; it has {known}.")
    return tuple(task for task in tasks if not only or {task.name, task.kind} & set(only))
