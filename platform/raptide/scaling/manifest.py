"""study.json: what a study is, how far each run has come, and what was found."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from raptide.errors import ConfigError
from raptide.patience import read_surely
from raptide.scaling.laws import NO_CURVES, Curves
from raptide.scaling.study import Study
from raptide.scaling.training import Ending
from raptide.small_files import write_whole
from raptide.version import code_version, hardware, versions

MANIFEST = "study.json"
PACKAGES = ("raptide", "torch", "deepspeed", "numpy", "ray")


def refuse_other_study(folder: Path, study: Study) -> None:
    """A folder holds one study; the same one may grow, and each run guards its own recipe.

    Raises:
        ConfigError: it holds another, or something else.
    """
    file = folder / MANIFEST
    if not file.exists():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(
                f"{folder} holds something else than a study; choose another --output."
            )
        return
    name = json.loads(read_surely(str(file), file.read_text))["study"]["name"]
    if name != study.settings.name:
        raise ConfigError(
            f"{folder} holds the study {name!r}, not {study.settings.name!r}; choose another "
            "--output."
        )


def write_manifest(
    folder: Path,
    study: Study,
    endings: Mapping[str, Ending],
    command: Sequence[str],
    curves: Curves = NO_CURVES,
) -> None:
    """Write down how the study stands, whole or not at all."""
    runs = {run.name: _standing(endings.get(run.name)) for run in study.runs}
    tree = {
        "study": study.settings.model_dump(),
        "runs": runs,
        "laws": {name: law.facts() for name, law in curves.laws.items()},
        "trends": [asdict(trend) for trend in curves.trends],
        "seed_deviation_nats": curves.deviation or None,
        **circumstances(command),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / MANIFEST, json.dumps(tree, indent=1) + "\n")


def _standing(ending: Ending | None) -> dict[str, Any]:
    if ending is None:
        return {"state": "waiting"}
    if ending.problem:
        return {"state": "failed", "problem": ending.problem}
    return {"state": "finished", "folder": str(ending.folder)}


def circumstances(command: Sequence[str]) -> dict[str, str]:
    """How a study was run, for people."""
    about = {"command": shlex.join(command), "code": code_version(), "hardware": hardware()}
    return about | versions(PACKAGES)
