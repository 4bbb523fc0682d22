"""Whole proteomes through engines to files: killed at any time, nothing lost, nothing twice.

    work = EmbedWork.of("runs/demo", pooling="mean")
    run_bulk(work, find_sources(["*.fasta"]), OutputFolder.at("embeddings"), BulkSettings())

Sources are cut into *units*, named by what they hold. Ray Data streams units to workers; a worker
has its engine in a process that may die, and writes one part a unit, whole or not at all. So what
is done is what lies there, and a job that is given again does the rest.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raptide.bulk.folder import OutputFolder
    from raptide.bulk.job import Outcome, run_bulk
    from raptide.bulk.places import BulkSettings
    from raptide.bulk.sources.find import find_sources, find_tables
    from raptide.bulk.variants import VariantWork
    from raptide.bulk.work import EmbedWork, ScanWork, ScoreWork

__all__ = [
    "BulkSettings",
    "EmbedWork",
    "Outcome",
    "OutputFolder",
    "ScanWork",
    "ScoreWork",
    "VariantWork",
    "find_sources",
    "find_tables",
    "run_bulk",
]

# Looked up late: engines' processes need the work alone, and start in a fraction of Ray's time.
_HOMES = {
    "OutputFolder": "folder",
    **dict.fromkeys(("Outcome", "run_bulk"), "job"),
    "BulkSettings": "places",
    **dict.fromkeys(("find_sources", "find_tables"), "sources.find"),
    "VariantWork": "variants",
    **dict.fromkeys(("EmbedWork", "ScanWork", "ScoreWork"), "work"),
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"raptide.bulk.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
