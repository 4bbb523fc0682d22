"""Works of bulk jobs that need no model: quick, counted, and deadly for some sequences.

Engines import this module in processes of their own.
"""

from __future__ import annotations

import os
import signal
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from raptide.bulk import units
from raptide.errors import ConfigError

SEGV, MEMORY, SLEEP, RAISE = "SEGVSEGV", "MEMMEMMEM", "SLEEPSLEEP", "RAISERAISE"
"""What a sequence does to its engine, if it holds one of these."""


@dataclass(frozen=True)
class CountedWork:
    """The check sum of each sequence; every one that is computed is written down."""

    log: str
    """File, a line a sequence: process, and sequence."""

    seconds: float = 0.0
    """That each sequence takes."""

    at_opening: str = ""
    """What becomes of the engine while it is opened: "refuse", "raise" or "die"."""

    seed: int = 0
    canary: str = "MKTAYIAK"

    def fingerprint(self):
        return {"work": "counted", "seed": self.seed}

    def flaw(self, name, item, length):
        return ""

    def tokens(self, residues):
        return residues + 2

    def output_bytes(self, residues):
        return np.full_like(residues, 8)

    def open(self, threads):
        if self.at_opening == "refuse":
            raise ConfigError("This engine opens for nobody.")
        if self.at_opening == "raise":
            raise OSError("no such device")
        if self.at_opening == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        return self.compute

    def compute(self, items):
        with open(self.log, "a") as log:
            log.writelines(f"{os.getpid()} {item}\n" for item in items)
        for item in items:
            self.harm(item)
            time.sleep(self.seconds)
        return [check_sum(item) for item in items]

    def harm(self, item):
        if SEGV in item:
            os.kill(os.getpid(), signal.SIGSEGV)
        if MEMORY in item:
            held = bytearray(1 << 30)
            held[::4096] = b"x" * len(held[::4096])
            time.sleep(60)
        if SLEEP in item:
            time.sleep(60)
        if RAISE in item:
            raise ValueError(f"secret letters {item}")

    def columns(self, items, values):
        return {"value": pa.array(values, pa.int64())}

    def computed(self):
        """All sequences computed so far, in order."""
        log = Path(self.log)
        return [line.split()[1] for line in log.read_text().splitlines()] if log.exists() else []


class ManyUnits(CountedWork):
    """Records are so dear that a unit holds eight."""

    def tokens(self, residues):
        return residues * 0 + units.LEAST_TOKENS // 8


class DeadlyWork(ManyUnits):
    """An engine that dies of everything."""

    def harm(self, item):
        os.kill(os.getpid(), signal.SIGKILL)


def check_sum(item):
    return zlib.crc32(item.encode())
