"""The bytes of answers that a gateway holds: bounded, and given out first come, first served."""

from __future__ import annotations

import asyncio
import time
from collections import deque

from serve.gateway.refusals import Refusal


class Lease:
    """Bytes of one request; to be given back once."""

    def __init__(self, ledger: Ledger, held_bytes: int) -> None:
        self._ledger = ledger
        self._held_bytes = held_bytes

    def end(self) -> None:
        held, self._held_bytes = self._held_bytes, 0
        self._ledger.give_back(held)


class Ledger:
    """What may be held, and who waits for it.

    Args:
        max_bytes: of all requests together. One that alone needs more waits until it is alone.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._held_bytes = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def held_bytes(self) -> int:
        return self._held_bytes

    async def hold(self, needed_bytes: int, deadline: float) -> Lease:
        """Room for an answer, after whoever came before.

        Args:
            deadline: as `time.monotonic()`.

        Raises:
            Refusal: there is none by then.
        """
        needed = min(needed_bytes, self._max_bytes)
        if self._waiting or not self._fits(needed):
            await self._wait(needed, deadline)
        else:
            self._held_bytes += needed
        return Lease(self, needed)

    def give_back(self, held_bytes: int) -> None:
        self._held_bytes -= held_bytes
        self._serve()

    async def _wait(self, needed: int, deadline: float) -> None:
        """Returns once `needed` bytes are counted as held."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((needed, turn))
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():  # its turn came as it gave up
                self._held_bytes -= needed
            turn.cancel()
            self._serve()
            if isinstance(error, TimeoutError):
                raise _no_room() from None
            raise

    def _serve(self) -> None:
        while self._waiting:
            needed, turn = self._waiting[0]
            if not turn.done():
                if not self._fits(needed):
                    return
                self._held_bytes += needed
                turn.set_result(None)
            self._waiting.popleft()

    def _fits(self, needed: int) -> bool:
        return self._held_bytes + needed <= self._max_bytes


def _no_room() -> Refusal:
    return Refusal(
        429,
        "overloaded",
        "The gateway holds as many bytes of other answers as it may; try again shortly, or ask "
        "for less at once.",
        retry_after_s=1.0,
    )
