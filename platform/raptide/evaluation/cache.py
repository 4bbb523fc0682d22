"""Results on disk: one file for each subject and task, kept by all that its numbers depend on.

A file is a .npz: `facts`, JSON in bytes, and the arrays that it names. It gets its name when its
last byte is there, and one that cannot be read counts as missing, so no crash leaves behind what
spoils the next run. Nothing in it is pickled.
"""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from raptide.evaluation.results import Figure, Heatmap, Lines, Measure, Points
from raptide.evaluation.samples import of_arrays, to_arrays
from raptide.storage import Storage

FORMAT_VERSION = 1

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
