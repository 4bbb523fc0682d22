"""The methods of both clients: the engine's, each a description of what is asked.

What runs them, and so what they return, is the client's: see `Client` and `AsyncClient`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TypedDict, Unpack

import numpy as np

from raptide.alphabet import decode_residues
from raptide.calls.inputs import plain_layers, read_sequences, refuse_no_list, refuse_unknown
from raptide.calls.scoring import score_mutants
from raptide.calls.variants import apply_variant, parse_variant
from raptide.client.asks import Ask, Embed, Scan, Score, Tables, Variants
from raptide.client.details import Answer
from raptide.client.pieces import LOGITS, Kind
from raptide.client.runner import Call
from raptide.errors import ConfigError, ServiceError
from raptide.methods import Long, Pooling, ScanMethod, ScoreMethod, VariantMethod

CONTACTS = Kind("/v1/contacts", "sequences", "values", large=True)


class Options(TypedDict, total=False):
    """What every method takes besides."""

    timeout_s: float | None
    """Seconds one request of this call may take, instead of the client's."""

    request_id: str | None
    """Names the call in the endpoint's log; its requests are ID-0, ID-1, …"""


class Methods:
    """The engine's methods; each takes `Options` besides."""

    def _run(self, call: Call[Any]) -> Any:
        """A list for a list, an iterator for an iterator."""
        raise NotImplementedError

    def embed(
        self,
        sequences: Any,
        pooling: Pooling = "mean",
        layers: Sequence[int] | None = None,
        long: Long = "error",
        **options: Unpack[Options],
    ) -> Any:
        """Representations of each sequence, fp32.

        Args:
            pooling: "mean" over the residues, "bos" the first token, "residue" one vector each.
            layers: 0 is the embedding, i the output of layer i, negative counts from the last; None
                is the last one.
            long: what becomes of sequences that the model does not take whole: refused ("error"),
                or computed in overlapping windows ("window"), as `Engine.embed` does.

        Returns:
            [n, D] for one layer, [n, layers, D] for several; with pooling "residue" a list of
            [L, D] or [layers, L, D], one per sequence. For an iterator, an iterator of the same.

        Raises:
            SequenceError: a sequence is empty, too long or holds something that is no residue.
            ConfigError: the endpoint refuses the key, the model or a layer.
            ServiceError: it cannot be reached, stays full, fails, or was updated after an iterator
                has given its first results.
        """
        refuse_unknown("pooling", pooling, Pooling)
        wanted = None if layers is None else plain_layers(layers)
        finish: Callable[[list[Any]], Any] = list if pooling == "residue" else _stack
        empty = None if pooling == "residue" else partial(_no_vectors, wanted)
        return self._ask(Embed(pooling, wanted), sequences, long, finish, empty, **options)

    def logits(
        self,
        sequences: Any,
        long: Long = "error",
        **options: Unpack[Options],
    ) -> Any:
        """Logits of each residue over the model's tokens, [L, V] fp32 for each sequence.

        Raises:
            SequenceError, ConfigError, ServiceError: as in `embed`.
        """
        return self._ask(Tables(LOGITS), sequences, long, **options)

    def contacts(self, sequences: Any, **options: Unpack[Options]) -> Any:
        """Probability that two residues touch (Cβ within 8 Å), [L, L] fp32 for each sequence.

        Raises:
            ConfigError: as in `embed`; or the model has no contact head.
            SequenceError, ServiceError: as in `embed`.
        """
        return self._ask(Tables(CONTACTS, "L"), sequences, "error", **options)

    def score_sequences(
        self,
        sequences: Any,
        method: ScoreMethod = "pseudo-ppl",
        long: Long = "error",
        **options: Unpack[Options],
    ) -> Any:
        """Mean log likelihood of each sequence's residues in nats, [n] float64; higher is likelier.

        Args:
            method: as in `Engine.score_sequences`.
            long: as in `embed`.

        Raises:
            SequenceError, ConfigError, ServiceError: as in `embed`.
        """
        refuse_unknown("method", method, ScoreMethod)
        return self._ask(Score(method), sequences, long, _numbers, **options)

    def score_variants(
        self,
        sequence: str,
        variants: Sequence[str],
        method: VariantMethod = "wt-marginals",
        long: Long = "error",
        **options: Unpack[Options],
    ) -> Any:
        """How much likelier each variant is than the sequence, in nats, [n] float64.

        Args:
            variants: substitutions counted from 1, `A42G`, several joined as `A42G:K50R`.
            method: as in `Engine.score_variants`.
            long: as in `embed`.

        Raises:
            SequenceError: as in `embed`; or a variant does not fit the sequence.
            ConfigError, ServiceError: as in `embed`.
        """
        refuse_unknown("method", method, VariantMethod)
        refuse_no_list(variants, "variants")
        (residues,) = read_sequences([sequence], float("inf"))
        changes = [parse_variant(variant, residues) for variant in variants]
        if not changes:
            return self._ask(Variants(method, []), [], long, _numbers, **options)
        plain = decode_residues(residues)
        if method != "pseudo-ppl":
            return self._ask(Variants(method, changes), [plain], long, _only, **options)
        mutants = [decode_residues(apply_variant(residues, change)) for change in changes]
        relative = partial(score_mutants, residues=len(residues))
        return self._ask(Score(method), [plain, *mutants], long, relative, **options)

    def scan(
        self,
        sequence: str,
        method: ScanMethod = "wt-marginals",
        long: Long = "error",
        **options: Unpack[Options],
    ) -> Any:
        """All single substitutions: [L, 20] fp32, as `score_variants` scores them.

        Columns are the standard residues in alphabetical order (`raptide.alphabet.STANDARD`).

        Raises:
            SequenceError, ConfigError, ServiceError: as in `embed`.
        """
        refuse_unknown("method", method, ScanMethod)
        return self._ask(Scan(method), [sequence], long, _only, **options)

    def _ask(
        self,
        ask: Ask,
        given: Any,
        long: Long,
        finish: Callable[[list[Any]], Any] = list,
        empty: Callable[[int], Any] | None = None,
        *,
        timeout_s: float | None = None,
        request_id: str | None = None,
    ) -> Any:
        refuse_unknown("long", long, Long)
        refuse_no_list(given, "sequences")
        if timeout_s is not None:
            refuse_small("timeout_s", timeout_s, 0.001)
        answer: Answer[Any] = Answer()
        if request_id is not None:
            answer.request_id = plain_id(request_id)
        return self._run(Call(ask, given, finish, empty, long == "window", timeout_s, answer))


def refuse_small(name: str, value: float, least: float) -> None:
    """Raises ConfigError where a number is below what makes sense, or none."""
    if not value >= least:
        raise ConfigError(f"{name} must be at least {least}, but {value!r} was given.")


def plain_id(request_id: str) -> str:
    """Raises ConfigError where an id cannot stand in a header."""
    if not (request_id.isascii() and request_id.isprintable() and 0 < len(request_id) <= 100):
        raise ConfigError(
            f"A request_id is plain text of 1 to 100 letters, but {request_id[:40]!r} was given."
        )
    return request_id


def is_lazy(given: Iterable[Any] | AsyncIterator[Any]) -> bool:
    """Whether results are to be given as they come."""
    return isinstance(given, Iterator | AsyncIterator)


def _stack(vectors: list[np.ndarray]) -> np.ndarray:
    try:
        return np.stack(vectors)
    except ValueError:
        shapes = sorted({each.shape for each in vectors})
        raise ServiceError(
            f"The endpoint answered with vectors of shapes {shapes[0]} and {shapes[-1]}; is it a "
            "Raptide endpoint?"
        ) from None


def _no_vectors(layers: list[int] | None, width: int) -> np.ndarray:
    """What the engine gives for an empty list."""
    several = layers is not None and len(layers) > 1
    shape = (0, len(layers or ()), width) if several else (0, width)
    return np.empty(shape, np.float32)


def _numbers(scores: list[float]) -> np.ndarray:
    return np.array(scores, np.float64)


def _only(results: list[Any]) -> Any:
    (result,) = results
    return result
