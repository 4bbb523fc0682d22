"""The runs of one request: sent side by side, answered in order, by one version of the weights.

The first run leads. A replica says when it has taken it, and which weights it has; only then are
the others sent, and to replicas of that version. So a request that finds no room is refused before
anything of it is computed, and an update that comes between its runs mixes nothing.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from typing import Any

from serve.calls import Done, Taken


class Lead:
    """What a request's first run brings in: that there is room for it, and the version it met.

    Args:
        weights: the digest of the only weights the client wants; empty where any will do.
        alone: whether there is no other run, so that nobody asks what it brings in.
    """

    def __init__(self, weights: str, *, alone: bool) -> None:
        self.weights = weights
        self._alone = alone
        self._taken = asyncio.Event()

    @property
    def is_taken(self) -> bool:
        return self._taken.is_set()

    @property
    def is_asked_for(self) -> bool:
        """Whether the replica is to say that it has taken the run that is sent now."""
        return not (self._alone or self.is_taken)

    def take(self, taken: Taken | Done) -> None:
        self.weights = taken.weights
        self._taken.set()

    async def taken_or_over(self, first: asyncio.Task[Done]) -> None:
        """Until the first run is in a replica's queue, or has ended."""
        waiting = asyncio.ensure_future(self._taken.wait())
        try:
            await asyncio.wait((first, waiting), return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()


async def in_order(
    runs: Sequence[slice],
    send: Callable[[slice, Lead], Coroutine[Any, Any, Done]],
    weights: str,
    at_once: int,
) -> AsyncGenerator[Done, None]:
    """What `send` returns for each run, in order.

    Args:
        weights: the digest of the only weights that may answer; empty where any may.
        at_once: runs on their way at a time.

    Raises:
        VersionGone: an update has taken the version of the first run away.
        Refusal: there are no answers, and why.
    """
    waiting = deque(runs)
    lead = Lead(weights, alone=len(runs) == 1)
    going: deque[asyncio.Task[Done]] = deque()
    try:
        while waiting or going:
            while waiting and len(going) < at_once:
                going.append(asyncio.create_task(send(waiting.popleft(), lead)))
                if lead.is_asked_for:
                    await lead.taken_or_over(going[0])
                    if going[0].done():
                        break
            done = await going.popleft()
            lead.take(done)
            yield done
    finally:
        for task in going:
            task.cancel()
