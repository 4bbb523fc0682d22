"""What is computed of each record: embeddings, scores, scans.

A work is small and safe to pickle: it names its model. `open` runs in the engine's process and is
what loads it; workers stay without torch, so what needs it is imported where it is used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from raptide.alphabet import STANDARD
from raptide.bulk.units import Sizes
from raptide.errors import ConfigError, SequenceError
from raptide.methods import MASKED_METHODS, Pooling, ScanMethod, ScoreMethod, blind_to_masks

Long = Literal["error", "window", "reject"]
Precision = Literal["fp32", "bf16"]
Dtype = Literal["fp32", "fp16"]

CANARY = "MKTAYIAKQRQISFVKSHFSRQ"
"""A record that any sound engine computes."""


class Rejected(NamedTuple):
    """Computed in place of a value, of a record that has none."""

    reason: str


Compute = Callable[[list[str]], Sequence[Any]]
"""Values of some items, in order; `Rejected` for an item that has none."""


class Work(Sizes, Protocol):
    """What is computed of each item."""

    canary: str
    """An item that computes wherever the engine is sound."""

    def fingerprint(self) -> dict[str, Any]:
        """All that the numbers depend on, in JSON's types."""

    def flaw(self, name: str, item: str, length: int) -> str:
        """Why nothing is computed of an item, or "".

        Raises:
            SequenceError: the record called `name` is to end the job.
        """

    def open(self, threads: int) -> Compute:
        """Load what computes."""

    def columns(self, items: list[str], values: list[Any]) -> dict[str, pa.Array]:
        """The items' values as columns of a part, n rows."""


@dataclass(frozen=True)
class Model:
    """A model as jobs need it before anything is loaded."""

    path: str
    digest: str
    layers: int
    width: int
    max_residues: int
    has_head: bool
    blind: bool
    """Whether it is an LSTM, which reads no `<mask>` and has no attention."""
    threads: int
    """Of one engine on CPUs; more for larger models, so that memory holds one a share of cores."""

    @classmethod
    def find(cls, path: str | Path) -> Model:
        """Look at a model folder or file.

        Raises:
            BundleError: there is no such model, or its weights do not fit.
        """
        from raptide.inference.forward import LONGEST_RESIDUES
        from raptide.model.device import threads_for
        from raptide.model.formats.detect import read_weights
        from raptide.model.formats.tensor_files import digest_weights

        weights = read_weights(path)
        settings = weights.settings
        specials = settings.alphabet.num_specials
        limit = settings.max_tokens
        parameters = 12 * settings.layers * settings.width**2
        return cls(
            path=str(Path(path).resolve()),
            digest=digest_weights(Path(path)),
            layers=settings.layers,
            width=settings.width,
            max_residues=limit - specials if limit else LONGEST_RESIDUES,
            has_head=weights.has_head,
            blind=settings.blind,
            threads=threads_for(parameters),
        )

    def refuse_method(self, *methods: str) -> None:
        """
        Raises:
            ConfigError: the model cannot score like that.
        """
        self._refuse_headless()
        for method in methods:
            if self.blind and method in MASKED_METHODS:
                raise ConfigError(f"{self.path}: {blind_to_masks(method)}")

    def _refuse_headless(self) -> None:
        if not self.has_head:
            raise ConfigError(
                f"{self.path} has no language-model head, so it gives embeddings but no scores; "
                "name the masked language model it was made from."
            )


def judge_length(name: str, length: int, most: int, long: Long) -> str:
    """Why nothing is computed of a record with so many residues, or "".

    Raises:
        SequenceError: it is too long, and that is to end the job.
    """
    if length <= most or long == "window":
        return ""
    if long == "error":
        raise SequenceError(
            f"Record {name[:80]!r} has {length:,} residues, but this model takes at most "
            f"{most:,}; ask for overlapping windows with --long window, or give --long reject."
        )
    return f"too long: {length:,} residues, and {most:,} are taken whole"


@dataclass(frozen=True)
class _ModelWork:
    """What embeddings and scores have in common."""

    model: Model
    precision: Precision
    long: Long

    canary = CANARY

    def flaw(self, name: str, item: str, length: int) -> str:
        return judge_length(name, length, self.model.max_residues, self.long)

    def _fingerprint(self, **more: Any) -> dict[str, Any]:
        common = {"model": self.model.digest, "precision": self.precision, "long": self.long}
        return common | more

    def _engine(self, threads: int) -> Any:
        import torch

        from raptide.inference.engine import Engine

        torch.set_num_threads(threads)
        return Engine.load(self.model.path, dtype=self.precision)

    @property
    def _long(self) -> Any:
        return "window" if self.long == "window" else "error"


@dataclass(frozen=True)
class EmbedWork(_ModelWork):
    """Embeddings of layers: [D] of each record, or [L, D] with pooling "residue"."""

    pooling: Pooling = "mean"
    layers: tuple[int, ...] = (-1,)
    dtype: Dtype = "fp32"
    """Of what is written; computed is what `precision` says, and pooled in fp32."""
    h5_keys: bool = False
    """Whether parts hold biotrainer's keys, for an HDF5 file made of them."""

    def __post_init__(self) -> None:
        from raptide.calls.inputs import read_layers

        read_layers(self.layers, self.model.layers)  # says what is wrong with them

    def fingerprint(self) -> dict[str, Any]:
        layers = [each + self.model.layers + 1 if each < 0 else each for each in self.layers]
        return self._fingerprint(
            work="embed",
            pooling=self.pooling,
            layers=layers,
            columns=[*self.names, *[H5_KEY] * self.h5_keys],
            dtype=self.dtype,
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Of the columns, a layer each."""
        if len(self.layers) == 1:
            return ("embedding",)
        return tuple(f"embedding_{layer}" for layer in self.layers)

    def tokens(self, residues: np.ndarray) -> np.ndarray:
        return residues + 2

    def output_bytes(self, residues: np.ndarray) -> np.ndarray:
        vectors = residues if self.pooling == "residue" else np.ones_like(residues)
        return vectors * (len(self.layers) * self.model.width * 4)

    def open(self, threads: int) -> Compute:
        engine = self._engine(threads)
        kind = np.float32 if self.dtype == "fp32" else np.float16

        def compute(items: list[str]) -> Sequence[np.ndarray | Rejected]:
            found = engine.embed(items, self.layers, self.pooling, self._long)
            return [_written(each, kind) for each in found]

        return compute

    def columns(self, items: list[str], values: list[np.ndarray]) -> dict[str, pa.Array]:
        if len(self.layers) == 1:
            values = [value[None] for value in values]
        columns = {
            name: self._column([value[index] for value in values])
            for index, name in enumerate(self.names)
        }
        if self.h5_keys:
            keys = [hashlib.sha256(f"{item}_{len(item)}".encode()).hexdigest() for item in items]
            columns[H5_KEY] = pa.array(keys, pa.string())
        return columns

    def _column(self, values: list[np.ndarray]) -> pa.Array:
        kind: Any = np.float32 if self.dtype == "fp32" else np.float16
        flat = np.concatenate([value.ravel() for value in values] or [np.empty(0, kind)])
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(flat), self.model.width)
        if self.pooling != "residue":
            return vectors
        ends = np.cumsum([0, *map(len, values)], dtype=np.int32)
        return pa.ListArray.from_arrays(pa.array(ends), vectors)


def _written(values: np.ndarray, kind: Any) -> np.ndarray | Rejected:
    """What is written of an embedding, or why it cannot be."""
    if values.dtype == kind:
        return values
    with np.errstate(over="ignore"):
        narrow = values.astype(kind)
    if np.isinf(narrow).any() and np.isfinite(values).all():
        return Rejected("overflow: a value is beyond fp16, write fp32")
    return narrow


H5_KEY = "h5_key"
"""Column of biotrainer's name for a sequence: SHA-256 of `SEQUENCE_LENGTH`."""


@dataclass(frozen=True)
class ScoreWork(_ModelWork):
    """The mean log likelihood of each record's residues, nats: column `score`, float64."""

    method: ScoreMethod = "pseudo-ppl"

    def __post_init__(self) -> None:
        self.model.refuse_method(self.method)

    def fingerprint(self) -> dict[str, Any]:
        return self._fingerprint(work="score", method=self.method)

    def tokens(self, residues: np.ndarray) -> np.ndarray:
        return tokens_of_passes(residues, self.method)

    def output_bytes(self, residues: np.ndarray) -> np.ndarray:
        return np.full_like(residues, 8)

    def open(self, threads: int) -> Compute:
        engine = self._engine(threads)
        return lambda items: engine.score_sequences(items, self.method, self._long).tolist()

    def columns(self, items: list[str], values: list[float]) -> dict[str, pa.Array]:
        return {"score": pa.array(values, pa.float64())}


@dataclass(frozen=True)
class ScanWork(_ModelWork):
    """All single substitutions of each record: column `scan`, [L, 20] fp32."""

    method: ScanMethod = "wt-marginals"

    def __post_init__(self) -> None:
        self.model.refuse_method(self.method)

    def fingerprint(self) -> dict[str, Any]:
        return self._fingerprint(work="scan", method=self.method, columns=STANDARD)

    def tokens(self, residues: np.ndarray) -> np.ndarray:
        return tokens_of_passes(residues, self.method)

    def output_bytes(self, residues: np.ndarray) -> np.ndarray:
        return residues * (len(STANDARD) * 4)

    def open(self, threads: int) -> Compute:
        engine = self._engine(threads)
        return lambda items: [engine.scan(item, self.method, self._long) for item in items]

    def columns(self, items: list[str], values: list[np.ndarray]) -> dict[str, pa.Array]:
        flat = np.concatenate([*(value.ravel() for value in values), np.empty(0, np.float32)])
        rows = pa.FixedSizeListArray.from_arrays(pa.array(flat), len(STANDARD))
        ends = np.cumsum([0, *map(len, values)], dtype=np.int32)
        return {"scan": pa.ListArray.from_arrays(pa.array(ends), rows)}


def tokens_of_passes(residues: np.ndarray, method: str) -> np.ndarray:
    """Tokens computed of each sequence: one pass, or one for every residue."""
    return (residues + 2) * (residues if method in MASKED_METHODS else 1)
