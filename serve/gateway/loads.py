"""How much each replica has to do, as one gateway knows it.

A gateway counts what it has sent and not had back. What other gateways have sent it hears from the
replicas, with each answer: between two answers it may be wrong, so work that meets a replica with
far more to do than the next best was believed to have is sent back at once, with the true figure.
"""

from __future__ import annotations

from serve.calls import Load


class Loads:
    """Tokens by replica."""

    def __init__(self) -> None:
        self._sent: dict[str, tuple[str, int]] = {}
        """By request: where it went, and its tokens."""
        self._own: dict[str, int] = {}
        self._others: dict[str, int] = {}

    def of(self, replica: str) -> int:
        return self._own.get(replica, 0) + self._others.get(replica, 0)

    def send(self, request: str, replica: str, tokens: int) -> None:
        self._sent[request] = replica, tokens
        self._own[replica] = self._own.get(replica, 0) + tokens

    def end(self, request: str) -> None:
        """Of a request, however it ended; of one that was never sent, nothing."""
        replica, tokens = self._sent.pop(request, ("", 0))
        left = self._own.pop(replica, 0) - tokens
        if left > 0:
            self._own[replica] = left

    def hear(self, load: Load, ended: int = 0) -> None:
        """What a replica says it has to do.

        Args:
            ended: tokens of own requests that it has ended, and that still count here.
        """
        own = self._own.get(load.replica, 0) - ended
        self._others[load.replica] = max(0, load.tokens - own)

    def forget(self, replica: str) -> None:
        """What it said, as it has gone."""
        self._others.pop(replica, None)


LOADS = Loads()
"""Of this process: Serve makes the routers, and tells them nothing of answers."""
