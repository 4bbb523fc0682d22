"""Group sequences into batches of bounded tokens."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence


def plan_batches(lengths: Sequence[int], max_tokens: int, lanes: int = 1) -> Iterator[list[int]]:
    """Indices into `lengths`, batch by batch, longest first.

    No batch holds more than `max_tokens` tokens, except that a longer sequence goes alone. Packed
    batches need no padding, so sorting only keeps the largest batch first: what fits in memory
    then fits to the end.

    Args:
        lanes: batches that are computed side by side; with several, all are of about as many
            tokens.
    """
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    if lanes > 1 and longest_first:
        yield from _even_batches(lengths, longest_first, max_tokens, lanes)
        return
    batch: list[int] = []
    held = 0
    for index in longest_first:
        if batch and held + lengths[index] > max_tokens:
            yield batch
            batch, held = [], 0
        batch.append(index)
        held += lengths[index]
    if batch:
        yield batch


def even_tokens(total: int, max_tokens: int, lanes: int) -> int:
    """Tokens of each batch, where lanes get as many batches each, of no more than the most."""
    return -(-total // (lanes * _rounds(total, max_tokens, lanes)))


def _rounds(total: int, max_tokens: int, lanes: int) -> int:
    """Batches of each lane, if sequences could be cut."""
    return -(-total // (lanes * max_tokens))


def _even_batches(
    lengths: Sequence[int], longest_first: list[int], max_tokens: int, lanes: int
) -> list[list[int]]:
    """Each sequence into the batch that has the fewest tokens so far."""
    rounds = _rounds(sum(lengths), max_tokens, lanes)
    while True:
        batches: list[list[int]] = [[] for _ in range(lanes * rounds)]
        loads = [(0, number) for number in range(len(batches))]
        for index in longest_first:
            held, number = loads[0]
            batches[number].append(index)
            heapq.heapreplace(loads, (held + lengths[index], number))
        if all(held <= max_tokens or len(batches[number]) == 1 for held, number in loads):
            return [batch for batch in batches if batch]
        rounds = max(rounds + 1, rounds * 9 // 8)  # in the end each has one
