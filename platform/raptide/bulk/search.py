"""Which record of a unit kills the engine? Found by halving.

What died is noted on disk, so that a job that is given again does not begin the search anew. Only
deaths of the engine's process are noted, which its worker has outlived: the death of a worker or of
a node says nothing about records.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from raptide.bulk.folder import DEATHS
from raptide.bulk.process import Death
from raptide.bulk.work import Rejected
from raptide.errors import RaptideError
from raptide.storage import Storage

DEADLY = 2
"""Deaths of one record alone that reject it."""

SEARCHES = 3
"""Searches after which a unit that still kills the engine as a whole ends the job."""

Compute = Callable[[list[str]], Sequence[Any]]


class _Note(NamedTuple):
    """Items `first` to `last` (exclusive) of the unit's different ones."""

    first: int
    last: int
    reason: str
    """Of a death; "" after a search through them."""


class Notes:
    """What is known of one unit's deaths.

    Args:
        limits: that the engine had; under others, what it died of may well compute.
    """

    def __init__(self, storage: Storage, unit: str, limits: str = "") -> None:
        self._storage, self._folder = storage, f"{DEATHS}/{unit}/{limits}".rstrip("/")
        names = storage.names(self._folder)
        self._notes = [_Note(*json.loads(storage.read(f"{self._folder}/{n}"))) for n in names]

    def add(self, first: int, last: int, reason: str) -> None:
        note = json.dumps([first, last, reason]).encode()
        name = f"{self._folder}/{len(self._notes):06d}"
        self._storage.write(name, lambda file: file.write(note))
        self._notes.append(_Note(first, last, reason))

    def deaths(self, first: int, last: int) -> int:
        return sum(note[:2] == (first, last) and note.reason != "" for note in self._notes)

    def reason(self, first: int, last: int) -> str:
        """Of the last death of a range."""
        reasons = [note.reason for note in self._notes if note[:2] == (first, last)]
        return next(filter(None, reversed(reasons)))

    def searches(self) -> int:
        return sum(note.reason == "" for note in self._notes)

    def deadly(self) -> dict[int, str]:
        """Items to be rejected, and why."""
        deaths = [note for note in self._notes if note.reason]
        alone = {note.first: note.reason for note in deaths if note.last - note.first == 1}
        return {i: why for i, why in alone.items() if self.deaths(i, i + 1) >= DEADLY}

    def forget(self) -> None:
        if self._notes:
            self._storage.delete(self._folder)
            self._notes = []


def compute_surely(
    items: list[str], compute: Compute, notes: Notes, canary: str
) -> list[Any | Rejected]:
    """Values of a unit's items, those that kill the engine rejected.

    The values do not depend on what died on the way: in the end the rest is computed as a whole.

    Raises:
        RaptideError: the engine dies, whatever it is given.
    """
    different = list(dict.fromkeys(items))
    values: dict[str, Any] = {}
    while True:
        deadly = notes.deadly() if notes.searches() else {}  # else the canary has not been asked
        kept = [item for index, item in enumerate(different) if index not in deadly]
        whole = (0, len(different))
        if notes.deaths(*whole) < DEADLY * (notes.searches() + 1):
            try:
                values = dict(zip(kept, compute(kept), strict=True)) if kept else {}
                break
            except Death as death:
                notes.add(*whole, str(death))
                continue
        if notes.searches() == SEARCHES:
            reason = notes.reason(*whole)
            notes.forget()  # with more memory or time, the search begins anew
            raise RaptideError(
                f"The engine dies of {len(kept)} records together ({reason}), though of none "
                "alone; give it more memory (--memory-gb) or time (--timeout-s)."
            )
        _search(different, *whole, compute, notes, canary)
        notes.add(*whole, "")
    values |= {different[index]: Rejected(reason) for index, reason in deadly.items()}
    return [values[item] for item in items]


def _search(
    items: list[str], first: int, last: int, compute: Compute, notes: Notes, canary: str
) -> None:
    """Find what is deadly among the items of a range that has died."""
    if last - first == 1:
        while notes.deaths(first, last) < DEADLY:
            if not _dies(items, first, last, compute, notes):
                return
        try:
            compute([canary])
        except Death as death:
            notes.forget()
            raise RaptideError(
                f"The engine dies of a plain protein too ({death}), so no record is to blame; give "
                "it more memory (--memory-gb) or time (--timeout-s), or look at its messages with "
                "--verbose."
            ) from None
        return
    middle = (first + last) // 2
    for start, stop in ((first, middle), (middle, last)):
        if notes.deaths(start, stop) or _dies(items, start, stop, compute, notes):
            _search(items, start, stop, compute, notes, canary)


def _dies(items: list[str], first: int, last: int, compute: Compute, notes: Notes) -> bool:
    try:
        compute(items[first:last])
    except Death as death:
        notes.add(first, last, str(death))
        return True
    return False
