"""What a process of a run at a URI writes goes there while it goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from raptide.errors import RaptideError
from raptide.training.mirror import Mirror
from raptide.training.watching.audit import AUDIT
from raptide.training.watching.tracking import METRICS
from raptide.training.watching.watch import HANGS

SEND_EVERY_S = 30.0


class Sender:
    """Sends the files of one process of a run whenever they have changed."""

    def __init__(self, mirror: Mirror, patterns: list[str], warn: Callable[[str], Any]) -> None:
        """
        Args:
            patterns: of the names of its files in the run's folder.
            warn: told, in a sentence, when files cannot be sent.
        """
        self._mirror, self._patterns, self._warn = mirror, patterns, warn
        self._sent: dict[str, tuple[int, int]] = {}
        self._lock = threading.Lock()
        self._failing = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._go_on, name="sender", daemon=True)
        self._thread.start()

    def send(self) -> None:
        """Send what has changed since the last time; a storage that fails is told of, once."""
        with self._lock:
            try:
                for name, state in self._states().items():
                    if self._sent.get(name) != state:
                        self._mirror.send(name)
                        self._sent[name] = state
                self._failing = False
            except (OSError, RaptideError) as error:
                if not self._failing:
                    self._warn(f"Files of the run were not sent ({error}); they will be later.")
                self._failing = True

    def close(self) -> None:
        """Send the last."""
        self._ended.set()
        self._thread.join()
        self.send()

    def _go_on(self) -> None:
        while not self._ended.wait(SEND_EVERY_S):
            self.send()

    def _states(self) -> dict[str, tuple[int, int]]:
        """When each file changed, and its size; those without a byte say nothing yet."""
        folder, found = self._mirror.folder, {}
        for file in [file for pattern in self._patterns for file in folder.glob(pattern)]:
            if file.is_file() and (status := file.stat()).st_size:
                found[str(file.relative_to(folder))] = (status.st_mtime_ns, status.st_size)
        return found


def sender_of_rank(
    mirror: Mirror, rank: int, local_rank: int, warn: Callable[[str], Any]
) -> Sender:
    """Fetch what a rank goes on with, and send what it writes from now on."""
    audit = f"{AUDIT}/rank-{rank:05d}.jsonl"
    own = [audit, *([METRICS] if rank == 0 else [])]
    mirror.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    mirror.fetch_own(*own)
    if rank == 0:
        own.append("wandb/**/*")
    if local_rank == 0:  # those who hung can send nothing
        own.append(f"{HANGS}/*")
    return Sender(mirror, own, warn)
