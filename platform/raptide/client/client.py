"""A client of a deployed endpoint, with the methods and the results of `raptide.Engine`.

    with Client("http://127.0.0.1:8000") as client:              # key: RAPTIDE_API_KEY
        client.embed(["MKTAYIAKQR", "GSHM"])                     # [2, D]
        client.embed(["MKTAYIAKQR"], pooling="residue")          # [[10, D]]
        client.score_variants("MKTAYIAKQR", ["K2A", "K2A:Q9E"])  # [2]
        for vector in client.embed(read(file)):                  # a generator in, a generator out
            ...

Long inputs are sent in chunks, several at a time; results come in the order of the input. An
endpoint that restarts, is updated or is full is asked again (`client/transport.py` says when).
Needs neither torch nor Ray.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import Any, Protocol, TypeVar, overload

import httpx
import numpy as np
from tqdm import tqdm

from raptide.client.answers import ARROW, read_arrays, read_data, read_scores
from raptide.client.chunks import Chunk, answers_in_order, cut_chunks, plain_sequences, shift_index
from raptide.client.transport import Transport
from raptide.errors import ConfigError, SequenceError
from raptide.methods import Pooling, ScanMethod, ScoreMethod, VariantMethod

CHUNK_TOKENS = 4_096
"""Tokens to compute in one request. Small enough that what is in flight is answered in time by an
endpoint on CPUs; per-residue answers are then at most 21 MB at 1,280 values a residue. Of several
layers each is a share of it, so that an answer is no larger."""

VARIANT_CHUNK_TOKENS = 32_768
"""The same for variants by pseudo perplexity: each request scores the sequence itself again."""

T = TypeVar("T")


class Read(Protocol):
    """Makes the results of an answer, given how many there must be."""

    def __call__(self, answer: httpx.Response, *, count: int) -> list[Any]: ...


class Client:
    """One endpoint. Safe to use from several threads; close it, or use it in a `with` block."""

    def __init__(
        self,
        url: str,
        key: str | None = None,
        model: str | None = None,
        *,
        timeout_s: float = 300.0,
        retry_s: float = 120.0,
        parallel: int = 4,
        chunk_sequences: int = 64,
        progress: bool = False,
    ) -> None:
        """Nothing is sent yet.

        Args:
            url: where the endpoint is, `http://host:port`.
            key: API key; None takes RAPTIDE_API_KEY from the environment, if it is set.
            model: a name of `models()`; None leaves the choice to the endpoint.
            timeout_s: seconds one request may take, its wait in the endpoint's queue included.
            retry_s: seconds to go on trying while nothing is answered; a proxy restarts in less
                than the default. 0 never tries again.
            parallel: requests at once.
            chunk_sequences: sequences, or variants, in one request.
            progress: show a bar on stderr.

        Raises:
            ConfigError: an argument is out of range, or the URL is none.
        """
        for name, value, least in (
            ("timeout_s", timeout_s, 0.001),
            ("retry_s", retry_s, 0),
            ("parallel", parallel, 1),
            ("chunk_sequences", chunk_sequences, 1),
        ):
            if not value >= least:
                raise ConfigError(f"{name} must be at least {least}, but {value!r} was given.")
        if key is None:
            key = os.environ.get("RAPTIDE_API_KEY") or None
        self._transport = Transport(url, key, timeout_s, retry_s, parallel)
        self._model = model
        self._parallel = parallel
        self._chunk_sequences = chunk_sequences
        self._progress = progress

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._transport.close()

    def models(self) -> list[dict[str, Any]]:
        """What the endpoint serves: `id`, `width`, `layers`, `max_residues`, `lineage` of each.

        Raises:
            ConfigError, ServiceError: as in `embed`.
        """
        return [*self._transport.ask("GET", "/v1/models", partial(read_data, fields=("id",)))]

    @overload
    def embed(
        self, sequences: Sequence[str], pooling: Pooling = ..., layers: Sequence[int] | None = ...
    ) -> np.ndarray | list[np.ndarray]: ...
    @overload
    def embed(
        self, sequences: Iterator[str], pooling: Pooling = ..., layers: Sequence[int] | None = ...
    ) -> Iterator[np.ndarray]: ...
    def embed(
        self,
        sequences: Sequence[str] | Iterator[str],
        pooling: Pooling = "mean",
        layers: Sequence[int] | None = None,
    ) -> np.ndarray | list[np.ndarray] | Iterator[np.ndarray]:
        """Representations of each sequence, fp32.

        Args:
            pooling: "mean" over the residues, "bos" the first token, "residue" one vector each.
            layers: 0 is the embedding, i the output of layer i, negative counts from the last; None
                is the last one.

        Returns:
            [n, D] for one layer, [n, layers, D] for several; with pooling "residue" a list of
            [L, D] or [layers, L, D], one per sequence. For an iterator, an iterator of the same.

        Raises:
            SequenceError: a sequence is empty, too long or holds something that is no residue.
            ConfigError: the endpoint refuses the key, the model or another argument.
            ServiceError: the endpoint cannot be reached, stays full or fails.
        """
        if layers is not None and not layers:
            raise ConfigError("At least one layer must be asked for; the last one is -1.")
        options: dict[str, Any] = {"pooling": pooling}
        if layers is not None:
            options["layers"] = list(layers)
        residues = pooling == "residue"
        depth = len(layers or (-1,))
        results = self._map_arrays(
            sequences,
            "/v1/embeddings",
            "input",
            options,
            "embedding",
            large=residues or depth > 1,
            max_tokens=CHUNK_TOKENS // depth if residues else CHUNK_TOKENS,
        )
        if residues or isinstance(results, Iterator):
            return results
        return np.stack(results) if results else self._no_vectors(layers)

    @overload
    def score_sequences(
        self, sequences: Sequence[str], method: ScoreMethod = ...
    ) -> np.ndarray: ...
    @overload
    def score_sequences(
        self, sequences: Iterator[str], method: ScoreMethod = ...
    ) -> Iterator[float]: ...
    def score_sequences(
        self, sequences: Sequence[str] | Iterator[str], method: ScoreMethod = "pseudo-ppl"
    ) -> np.ndarray | Iterator[float]:
        """Mean log likelihood of each sequence's residues in nats, [n] float64; higher is likelier.

        Args:
            method: as in `Engine.score_sequences`.

        Raises:
            SequenceError, ConfigError, ServiceError: as in `embed`.
        """
        passes_each = method == "pseudo-ppl"

        def send(chunk: Chunk, stop: threading.Event) -> list[float]:
            body = {"sequences": chunk, "method": method}
            return self._post("/v1/scores", body, read_scores, len(chunk), stop)

        results = self._map(sequences, send, passes_each)
        return results if isinstance(results, Iterator) else np.array(results, np.float64)

    def score_variants(
        self, sequence: str, variants: Sequence[str], method: VariantMethod = "wt-marginals"
    ) -> np.ndarray:
        """How much likelier each variant is than the sequence, in nats, [n] float64.

        Args:
            variants: substitutions counted from 1, `A42G`, several joined as `A42G:K50R`.
            method: as in `Engine.score_variants`.

        Raises:
            SequenceError: as in `embed`; or a variant does not fit the sequence.
            ConfigError, ServiceError: as in `embed`.
        """
        if isinstance(variants, str):
            raise SequenceError("A list of variants is needed, but one string was given: use [it].")
        (plain,) = plain_sequences([sequence])
        size = self._chunk_sequences
        if method == "pseudo-ppl":  # each is a sequence of its own, scored with a pass a residue
            cost = len(plain) * (len(plain) + 2)
            size = max(1, min(size, VARIANT_CHUNK_TOKENS // cost))
        chunks = (list(variants[i : i + size]) for i in range(0, len(variants), size))

        def send(some: list[str], stop: threading.Event) -> list[float]:
            body = {"sequence": plain, "variants": some, "method": method}
            return self._post("/v1/scores", body, read_scores, len(some), stop)

        scores = self._in_order(send, chunks, len(variants), " variants")
        return np.fromiter(scores, np.float64)

    def scan(self, sequence: str, method: ScanMethod = "wt-marginals") -> np.ndarray:
        """All single substitutions: [L, 20] fp32, as `score_variants` scores them.

        Columns are the standard residues in alphabetical order (`raptide.alphabet.STANDARD`).

        Raises:
            SequenceError, ConfigError, ServiceError: as in `embed`.
        """
        (plain,) = plain_sequences([sequence])
        body = {"sequence": plain, "method": method, "encoding_format": "base64"}
        (table,) = self._post("/v1/scan", body, partial(read_arrays, field="values"), 1)
        return table

    @overload
    def contacts(self, sequences: Sequence[str]) -> list[np.ndarray]: ...
    @overload
    def contacts(self, sequences: Iterator[str]) -> Iterator[np.ndarray]: ...
    def contacts(
        self, sequences: Sequence[str] | Iterator[str]
    ) -> list[np.ndarray] | Iterator[np.ndarray]:
        """Probability that two residues touch (Cβ within 8 Å), [L, L] fp32 for each sequence.

        Raises:
            ConfigError: as in `embed`; or the model has no contact head.
            SequenceError, ServiceError: as in `embed`.
        """
        return self._map_arrays(sequences, "/v1/contacts", "sequences", {}, "values", large=True)

    @overload
    def logits(self, sequences: Sequence[str]) -> list[np.ndarray]: ...
    @overload
    def logits(self, sequences: Iterator[str]) -> Iterator[np.ndarray]: ...
    def logits(
        self, sequences: Sequence[str] | Iterator[str]
    ) -> list[np.ndarray] | Iterator[np.ndarray]:
        """Logits of each residue over the model's tokens, [L, V] fp32 for each sequence.

        Raises:
            SequenceError, ConfigError, ServiceError: as in `embed`.
        """
        return self._map_arrays(sequences, "/v1/logits", "sequences", {}, "values", large=True)

    def _map_arrays(
        self,
        sequences: Sequence[str] | Iterator[str],
        path: str,
        given: str,
        options: dict[str, Any],
        found: str,
        large: bool,
        max_tokens: int = CHUNK_TOKENS,
    ) -> Any:
        """One array a sequence; `given` and `found` are the fields of request and answer.

        Args:
            large: take Arrow.
            max_tokens: of one request.
        """
        read = partial(read_arrays, field=found)
        accept = ARROW if large else "application/json"

        def send(chunk: Chunk, stop: threading.Event) -> list[np.ndarray]:
            body = {given: chunk, "encoding_format": "base64"} | options
            return self._post(path, body, read, len(chunk), stop, accept)

        return self._map(sequences, send, max_tokens=max_tokens)

    def _map(
        self,
        sequences: Sequence[str] | Iterator[str],
        send: Callable[[Chunk, threading.Event], list[T]],
        passes_each: bool = False,
        max_tokens: int = CHUNK_TOKENS,
    ) -> Any:
        """A list for a list, an iterator for an iterator."""
        if isinstance(sequences, str):
            raise SequenceError(
                "A list of sequences is needed, but one string was given: use [it]."
            )

        def send_counted(chunk: Chunk, stop: threading.Event) -> list[T]:
            try:
                return send(chunk, stop)
            except SequenceError as error:
                raise SequenceError(shift_index(str(error), chunk.first)) from None

        plain: Iterable[str] = plain_sequences(sequences)
        total = None
        if not isinstance(sequences, Iterator):
            plain = list(plain)  # a mistake in a list is found before anything is sent
            total = len(plain)
        chunks = cut_chunks(plain, self._chunk_sequences, max_tokens, passes_each)
        results = self._in_order(send_counted, chunks, total, " sequences")
        return results if total is None else list(results)

    def _in_order(
        self,
        send: Callable[[Any, threading.Event], list[T]],
        chunks: Iterable[list[str]],
        total: int | None,
        unit: str,
    ) -> Iterator[T]:
        with (
            tqdm(total=total, unit=unit, disable=not self._progress) as bar,
            closing(answers_in_order(send, chunks, self._parallel)) as answers,
        ):
            for some in answers:
                bar.update(len(some))
                yield from some

    def _post(
        self,
        path: str,
        body: dict[str, Any],
        read: Read,
        count: int,
        stop: threading.Event | None = None,
        accept: str = "application/json",
    ) -> list[Any]:
        """One request for `count` results."""
        if self._model is not None:
            body = body | {"model": self._model}
        read_all = partial(read, count=count)
        return self._transport.ask("POST", path, read_all, body, accept, stop)

    def _no_vectors(self, layers: Sequence[int] | None) -> np.ndarray:
        """What the engine gives for an empty list."""
        models = {model["id"]: model for model in self.models()}
        model = models.get(self._model, next(iter(models.values())))
        if "width" not in model:  # no replica has told it yet
            model = self._transport.ask("GET", f"/v1/models/{model['id']}", httpx.Response.json)
        width = model["width"]
        several = layers is not None and len(layers) > 1
        return np.empty((0, len(layers or ()), width) if several else (0, width), np.float32)
