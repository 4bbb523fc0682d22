"""Results on disk: one file for each subject and task, kept by all that its numbers depend on.

A file is a .npz: `facts`, JSON in bytes, and the arrays that it names. It gets its name when its
last byte is there, and one that cannot be read counts as missing, so no crash leaves behind what
spoils the next run. Nothing in it is pickled.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from raptide.errors import ConfigError, RaptideError
from raptide.evaluation.results import Figure, Heatmap, Lines, Measure, Points
from raptide.evaluation.samples import of_arrays, to_arrays
from raptide.patience import reason_of
from raptide.small_files import claim
from raptide.storage import PARTIAL, Storage

FORMAT_VERSION = 1

LOCK = ".lock"

MADE = re.compile(
    r"[0-9a-f]{40}\.npz|read-[0-9a-f]+(-\w+)?|random-[0-9a-f]+(\.\w+)?|ngrams-[0-9a-f]+\.safetensors"
    rf"|\.ngrams-.*\.partial|[0-9a-f]+\{LOCK}|{PARTIAL}"
)
"""Names of what an evaluation leaves in its cache: results, scratch, what is made of data alone."""

FIGURES = {each.__name__: each for each in (Lines, Heatmap, Points)}


@dataclass(frozen=True)
class Measured:
    """A measure with its value and the interval of it."""

    measure: Measure
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Result:
    """What a task found of a subject."""

    measured: list[Measured]
    notes: list[str]
    figures: list[Figure]
    seconds: float
    """Of measuring; what was read before, for several tasks at once, is not in it."""

    def main(self) -> Measured | None:
        """The task's main number."""
        return next((each for each in self.measured if each.measure.role == "main"), None)


@dataclass(frozen=True)
class ResultCache:
    """A folder of results."""

    folder: Path

    def find(self, key: str) -> Result | None:
        """The result under a key; None where there is none, or none that can be read."""
        path = self.folder / f"{key}.npz"
        try:
            with np.load(path, allow_pickle=False) as arrays:
                facts = json.loads(arrays["facts"].tobytes())
                return _unpack(facts, arrays) if facts["format"] == FORMAT_VERSION else None
        except Exception:  # damage shows in as many ways as there are bytes
            return None

    def keep(self, key: str, result: Result) -> None:
        """Write a result, whole or not at all."""
        arrays: dict[str, np.ndarray] = {}
        facts = json.dumps(_pack(result, arrays)).encode()
        buffer = io.BytesIO()
        arrays["facts"] = np.frombuffer(facts, np.uint8)
        np.savez_compressed(buffer, allow_pickle=False, **arrays)
        storage = Storage.of(self.folder)
        storage.write(f"{key}.npz", lambda file: file.write(buffer.getvalue()))

    @contextmanager
    def turn(self, digest: str, waits: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Within the block no other process reads a subject into this folder; waits for its end.

        A killed process waits for nobody and is waited for by nobody. Where a file system has no
        locks, all go on at once.

        Args:
            digest: the subject's.
            waits: called once, if another process is at it.

        Raises:
            RaptideError: nothing can be written into the folder.
        """
        path = self.folder / f"{digest[:16]}{LOCK}"
        while True:
            with _open_lock(path) as file:
                if not claim(file):
                    waits()
                    fcntl.flock(file, fcntl.LOCK_EX)
                if not _is_still(path, file):  # whoever had it took the file away
                    continue
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
                return

    def clear(self) -> None:
        """Delete what evaluations left here, and nothing else.

        Raises:
            ConfigError: the folder holds other things, or another process is at work in it.
        """
        there = sorted(self.folder.glob("*"))
        others = [path.name for path in there if not MADE.fullmatch(path.name)]
        if others:
            raise ConfigError(
                f"{self.folder} holds {others[0]!r}, which no evaluation wrote, so nothing is "
                "deleted; choose another --cache."
            )
        if any(_is_held(path) for path in there if path.name.endswith(LOCK)):
            raise ConfigError(
                f"Another evaluation is at work in {self.folder}, so nothing is deleted; wait for "
                "its end, stop it, or choose another --cache."
            )
        for path in there:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        with suppress(FileNotFoundError):
            self.folder.rmdir()


def _open_lock(path: Path) -> Any:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("w")
    except OSError as error:
        raise RaptideError(
            f"{path.parent} cannot be written ({reason_of(error)}); make room, mend the "
            "permissions, or give another --cache."
        ) from None


def _is_still(path: Path, file: Any) -> bool:
    """Whether an open file still has its name."""
    return path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno()))


def _is_held(path: Path) -> bool:
    with path.open() as file:
        return not claim(file)


def key_of(*parts: Any) -> str:
    """Of what a result depends on, in JSON's types; 40 hex digits."""
    text = json.dumps([FORMAT_VERSION, *parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:40]


def _pack(result: Result, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """The result in JSON's types; its arrays go into `arrays`."""

    def put(value: Any) -> Any:
        if not isinstance(value, np.ndarray):
            return value
        arrays[name := f"a{len(arrays)}"] = value
        return {"array": name}

    measured = [
        {
            **{each.name: getattr(m.measure, each.name) for each in fields(Measure)},
            "sample": {name: put(value) for name, value in to_arrays(m.measure.sample).items()},
            "numbers": [m.value, m.low, m.high],
        }
        for m in result.measured
    ]
    figures = [
        {"figure": type(figure).__name__}
        | {each.name: put(getattr(figure, each.name)) for each in fields(figure)}
        for figure in result.figures
    ]
    return {
        "format": FORMAT_VERSION,
        "measured": measured,
        "notes": result.notes,
        "figures": figures,
        "seconds": result.seconds,
    }


def _unpack(facts: dict[str, Any], arrays: Any) -> Result:
    def take(value: Any) -> Any:
        return arrays[value["array"]] if isinstance(value, dict) and "array" in value else value

    measured = []
    for each in facts["measured"]:
        value, low, high = each.pop("numbers")
        sample = of_arrays({name: take(part) for name, part in each.pop("sample").items()})
        measured.append(Measured(Measure(sample=sample, **each), value, low, high))
    figures = [
        FIGURES[each.pop("figure")](**{name: take(part) for name, part in each.items()})
        for each in facts["figures"]
    ]
    return Result(measured, facts["notes"], figures, facts["seconds"])
