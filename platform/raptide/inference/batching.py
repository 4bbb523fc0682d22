"""Group sequences into batches of bounded tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def plan_batches(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Indices into `lengths`, batch by batch, longest first.

    No batch holds more than `max_tokens` tokens, except that a longer sequence goes alone. Packed
    batches need no padding, so sorting only keeps the largest batch first: what fits in memory
    then fits to the end.
    """
    batch: list[int] = []
    held = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and held + lengths[index] > max_tokens:
            yield batch
            batch, held = [], 0
        batch.append(index)
        held += lengths[index]
    if batch:
        yield batch
