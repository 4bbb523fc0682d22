"""What a process of a run at a URI writes goes there while it goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from raptide.attempts import Attempts
from raptide.errors import ConfigError, RaptideError, Superseded
from raptide.kept import CACHE
from raptide.patience import reason_of
from raptide.training.mirror import Mirror
from raptide.training.watching.audit import AUDIT
from raptide.training.watching.tracking import METRICS
from raptide.training.watching.watch import HANGS

SEND_EVERY_S = 30.0
SEND_LARGE_EVERY_S = 600.0


class Sender:
    """Sends the files of one process whenever they have changed, as long as the run is its own."""

    def __init__(
        self,
        mirror: Mirror,
        attempt: str,
        patterns: Sequence[str],
        warn: Callable[[str], Any],
        *,
        large: Sequence[str] = (),
    ) -> None:
        """
        Args:
            attempt: the name of the one it belongs to.
            patterns: of the names of its files in the run's folder.
            warn: told, in a sentence, when files cannot be sent.
            large: patterns of files that are sent rarely, and at the end.
        """
        self._mirror, self._attempt, self._warn = mirror, attempt, warn
        self._patterns, self._large = tuple(patterns), tuple(large)
        self._sent: dict[str, tuple[int, int]] = {}
        self._lock = threading.Lock()
        self._failing = self._superseded = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._go_on, name="sender", daemon=True)
        self._thread.start()

    def send(self) -> None:
        """Send what has changed since the last time; a storage that fails is told of, once."""
        self._send(self._patterns, "they will be later")

    def close(self) -> None:
        """Send the last."""
        self._ended.set()
        self._thread.join()
        last = f"the last of them are in {self._mirror.folder} alone"
        self._send((*self._patterns, *self._large), last)

    def _go_on(self) -> None:
        began = time.monotonic()
        while not self._ended.wait(SEND_EVERY_S):
            self.send()
            if time.monotonic() - began > SEND_LARGE_EVERY_S:
                self._send(self._large, "they will be later")
                began = time.monotonic()

    def _send(self, patterns: Sequence[str], outlook: str) -> None:
        with self._lock:
            try:
                changed = {
                    name: state
                    for name, state in self._states(patterns).items()
                    if self._sent.get(name) != state
                }
                if self._superseded or not changed:
                    return
                Attempts(self._mirror.storage).refuse_others(self._attempt)
                for name, state in changed.items():
                    self._mirror.send(name)
                    self._sent[name] = state
                self._failing = False
            except Superseded:  # whoever trains finds out, and says so
                self._superseded = True
            except (OSError, RaptideError) as error:
                if not self._failing or self._ended.is_set():
                    self._warn(f"Files of the run were not sent ({error}); {outlook}.")
                self._failing = True

    def _states(self, patterns: Sequence[str]) -> dict[str, tuple[int, int]]:
        """When each file changed, and its size; those without a byte say nothing yet."""
        folder, found = self._mirror.folder, {}
        for file in [file for pattern in patterns for file in folder.glob(pattern)]:
            if file.is_file() and (status := file.stat()).st_size:
                found[str(file.relative_to(folder))] = (status.st_mtime_ns, status.st_size)
        return found


def sender_of_rank(
    mirror: Mirror, attempt: str, rank: int, local_rank: int, warn: Callable[[str], Any]
) -> Sender:
    """Fetch what a rank goes on with, and send what it writes from now on.

    Raises:
        ConfigError: this node's cache cannot be written.
    """
    own = [f"{AUDIT}/rank-{rank:05d}.jsonl", *([METRICS] if rank == 0 else [])]
    try:
        mirror.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        mirror.fetch_own(*own)
    except OSError as error:
        raise ConfigError(
            f"{mirror.folder} cannot be written ({reason_of(error)}); name another folder in "
            f"{CACHE} on all nodes."
        ) from None
    if local_rank == 0:  # those who hung can send nothing
        own.append(f"{HANGS}/*")
    return Sender(mirror, attempt, own, warn, large=["wandb/**/*"] if rank == 0 else [])
