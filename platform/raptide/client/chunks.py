"""Long inputs in chunks of one request each, several requests at once, answers in order."""

from __future__ import annotations

import re
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from raptide.alphabet import decode_residues, encode_residues
from raptide.errors import SequenceError

T = TypeVar("T")
C = TypeVar("C")


class Chunk(list[str]):
    """Sequences of one request."""

    def __init__(self, first: int) -> None:
        self.first = first
        """Index of the first one in the whole call."""


def plain_sequences(sequences: Iterable[str]) -> Iterator[str]:
    """Each sequence in plain capitals, as the engine would read it.

    Raises:
        SequenceError: one is empty or holds something that is no residue.
    """
    for index, sequence in enumerate(sequences):
        if not isinstance(sequence, str):
            raise SequenceError(
                f"Sequence {index}: a string of residue letters is needed, but a "
                f"{type(sequence).__name__} was given."
            )
        try:
            yield decode_residues(encode_residues(sequence))
        except SequenceError as error:
            raise SequenceError(f"Sequence {index}: {error}") from None


def cut_chunks(
    sequences: Iterable[str], max_sequences: int, max_tokens: int, passes_each: bool
) -> Iterator[Chunk]:
    """Neighbours together, up to both limits; a sequence above `max_tokens` goes alone.

    Args:
        passes_each: a forward pass is computed for each residue of a sequence.
    """
    chunk = Chunk(0)
    room = max_tokens
    for index, sequence in enumerate(sequences):
        tokens = (len(sequence) + 2) * (len(sequence) if passes_each else 1)
        if chunk and (tokens > room or len(chunk) >= max_sequences):
            yield chunk
            chunk, room = Chunk(index), max_tokens
        chunk.append(sequence)
        room -= tokens
    if chunk:
        yield chunk


def shift_index(message: str, first: int) -> str:
    """A refusal that counts from the start of its chunk, counted from the start of the call."""
    return re.sub(r"^Sequence (\d+)", lambda found: f"Sequence {int(found[1]) + first}", message)


def answers_in_order(
    send: Callable[[C, threading.Event], T], chunks: Iterable[C], parallel: int
) -> Generator[T, None, None]:
    """What `send` returns for each chunk, in order; reads two rounds of requests ahead.

    After an error, or when the caller reads no further, what waits is not sent any more, and the
    event that `send` was given is set.
    """
    pool = ThreadPoolExecutor(parallel, thread_name_prefix="raptide-client")
    stop = threading.Event()
    waiting: deque[Future[T]] = deque()
    try:
        for chunk in chunks:
            waiting.append(pool.submit(send, chunk, stop))
            if len(waiting) >= 2 * parallel:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        stop.set()
        pool.shutdown(wait=False, cancel_futures=True)
