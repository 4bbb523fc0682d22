"""A client of a deployed endpoint, with the methods and the results of `raptide.Engine`.

    with Client("http://127.0.0.1:8000") as client:              # key: RAPTIDE_API_KEY
        client.embed(["MKTAYIAKQR", "GSHM"])                     # [2, D]
        client.embed(["MKTAYIAKQR"], pooling="residue")          # [[10, D]]
        client.score_variants("MKTAYIAKQR", ["K2A", "K2A:Q9E"])  # [2]
        for vector in client.embed(read(file)):                  # a generator in, a generator out
            ...
        client.detailed.embed(["MKTAYIAKQR"]).weights            # what answered, and how

Long inputs are sent in chunks, several at a time; results come in the order of the input, all of
one call from one version of the weights. An endpoint that restarts, is updated or is full is asked
again (`client/exchange.py` says when). Needs neither torch nor Ray.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterator
from typing import Any, TypeVar

from raptide.client.connection import Connection
from raptide.client.methods import is_lazy
from raptide.client.runner import Call
from raptide.client.signatures import BlockingMethods
from raptide.client.transport import BlockingTransport
from raptide.errors import SequenceError

T = TypeVar("T")


class Client(Connection, BlockingMethods):
    """One endpoint. Safe to use from several threads; close it, or use it in a `with` block."""

    _opens = BlockingTransport
    _transport: BlockingTransport

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._transport.close()

    @property
    def detailed(self) -> DetailedClient:
        """The same methods, which return an `Answer`: the result with what answered, and how."""
        return DetailedClient(self)

    def models(self) -> list[dict[str, Any]]:
        """What the endpoint serves: `id`, `width`, `layers`, `max_residues`, `lineage` of each.

        Raises:
            ConfigError, ServiceError: as in `embed`.
        """
        return drive(self._runner.models())

    def _run(self, call: Call[T]) -> Any:
        if isinstance(call.given, AsyncIterator):
            raise SequenceError(
                "A list or a generator of sequences is needed, but an async generator was given: "
                "use AsyncClient."
            )
        if is_lazy(call.given):
            return _iterate(self._runner.generate(call))
        return drive(self._runner.collect(call))


class DetailedClient(BlockingMethods):
    """A client's methods, each with an `Answer` around what it returns."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def _run(self, call: Call[T]) -> Any:
        call.answer.result = self._client._run(call)
        return call.answer


def drive(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that is never suspended."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    raise RuntimeError("A blocking transport has suspended.")


def _iterate(results: AsyncGenerator[T, None]) -> Iterator[T]:
    try:
        while True:
            try:
                yield drive(anext(results))
            except StopAsyncIteration:
                return
    finally:
        drive(results.aclose())
