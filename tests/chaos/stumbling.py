"""Folders whose file system stumbles for all processes that are started from here (stumble.c)."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from raptide.errors import RaptideError

SOURCE = Path(__file__).with_name("stumble.c")


class Stumbles:
    """What has failed so far, and outages on demand."""

    def __init__(self, scratch: Path) -> None:
        self.log, self.outage = scratch / "stumbles.log", scratch / "outage"

    def counts(self) -> Counter[str]:
        """Calls that failed, by `open`, `read`, `write`, `outage`."""
        return Counter(self.log.read_text().split()) if self.log.exists() else Counter()

    def drop_out(self, seconds: float) -> None:
        """For so long nothing in the folders can be opened."""
        self.outage.touch()
        time.sleep(seconds)
        self.outage.unlink()


@contextmanager
def stumbling(scratch: Path, folders: Sequence[Path], permille: int) -> Iterator[Stumbles]:
    """Within the block, what other processes do in the folders fails `permille` in 1,000 times.

    Args:
        scratch: outside of them.
    """
    if shutil.which("cc") is None:
        raise RaptideError("Faults are made by a few lines of C; install a C compiler (cc).")
    library, stumbles = scratch / "stumble.so", Stumbles(scratch)
    command = ["cc", "-shared", "-fPIC", "-O2", "-o", str(library), str(SOURCE), "-ldl"]
    subprocess.run(command, check=True)
    settings = {
        "LD_PRELOAD": str(library),
        "STUMBLE_BELOW": ":".join(f"{folder}/" for folder in folders),
        "STUMBLE_PERMILLE": str(permille),
        "STUMBLE_LOG": str(stumbles.log),
        "STUMBLE_OUTAGE": str(stumbles.outage),
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ |= settings
    try:
        yield stumbles
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
