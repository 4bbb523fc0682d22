"""Raptide: train protein language models on a Ray cluster and serve them from it.

    from raptide import AsyncClient, Client, Corpus, Engine

They are loaded on first use: data tasks and clients need no torch, and the engine needs no Ray.
`pip install raptide` brings all but what the engine needs (`raptide[engine]`).
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
    ServiceError,
    StreamStalled,
)

if TYPE_CHECKING:
    from raptide.client import AsyncClient, Client
    from raptide.data.corpus import Corpus
    from raptide.inference.engine import Engine

__version__ = "0.1.0"

__all__ = [
    "AsyncClient",
    "BundleError",
    "CheckpointError",
    "Client",
    "ConfigError",
    "Corpus",
    "CorpusError",
    "Engine",
    "FastaError",
    "InputError",
    "RaptideError",
    "SequenceError",
    "ServiceError",
    "StreamStalled",
]

_HOMES = {
    "AsyncClient": "raptide.client",
    "Client": "raptide.client",
    "Corpus": "raptide.data.corpus",
    "Engine": "raptide.inference.engine",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        try:
            return getattr(import_module(_HOMES[name]), name)
        except ModuleNotFoundError as error:
            if name != "Engine" or (error.name or "").startswith("raptide"):
                raise
            raise ImportError(
                f"raptide.Engine needs the package {error.name}, which is not installed: "
                "pip install 'raptide[engine]'."
            ) from error
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
