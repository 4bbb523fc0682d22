"""Raptide: train protein language models on a Ray cluster and serve them from it.

    from raptide import Corpus, Engine

Both are loaded on first use: data tasks need no torch, and the engine needs no Ray.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from raptide.errors import (
    BundleError,
    CheckpointError,
    ConfigError,
    CorpusError,
    FastaError,
    InputError,
    RaptideError,
    SequenceError,
    StreamStalled,
)

if TYPE_CHECKING:
    from raptide.data.corpus import Corpus
    from raptide.inference.engine import Engine

__version__ = "0.1.0"

__all__ = [
    "BundleError",
    "CheckpointError",
    "ConfigError",
    "Corpus",
    "CorpusError",
    "Engine",
    "FastaError",
    "InputError",
    "RaptideError",
    "SequenceError",
    "StreamStalled",
]

_HOMES = {"Corpus": "raptide.data.corpus", "Engine": "raptide.inference.engine"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
