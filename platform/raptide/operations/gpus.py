"""What NVIDIA's tools and the kernel's log tell of a node's GPUs.

Read from their texts, which the tests make up: none of it was exercised on a GPU yet.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass

COMMAND_S = 30.0

QUERY = ("index", "name", "driver_version", "memory.total", "memory.free")
ECC = "ecc.errors.uncorrected.volatile.total"

FATAL_XIDS = frozenset({48, 62, 63, 64, 74, 79, 92, 94, 95, 109, 119, 120, 140})
"""Xids after which a GPU needs a reset or a repair: memory, NVLink, off the bus, its own processor.
Others are mostly a program's own faults."""


@dataclass(frozen=True)
class Gpu:
    """One GPU as nvidia-smi sees it; memory in MiB."""

    index: int
    name: str
    driver: str
    total_mib: int
    free_mib: int
    uncorrected_ecc: int
    """Memory errors since the driver was loaded; 0 where it does not count them."""


def read_gpus() -> list[Gpu]:
    """Those of this node; none where there is no nvidia-smi."""
    text = _ask("nvidia-smi", f"--query-gpu={','.join((*QUERY, ECC))}", *FORMAT)
    return parse_gpus(text) if text is not None else []


FORMAT = ("--format=csv,noheader,nounits",)


def parse_gpus(text: str) -> list[Gpu]:
    """What nvidia-smi prints for QUERY and ECC as CSV without a header and units."""
    gpus = []
    for line in text.strip().splitlines():
        index, name, driver, total, free, ecc = (field.strip() for field in line.split(","))
        counted = int(ecc) if ecc.isdecimal() else 0  # "[N/A]" without such memory
        gpus.append(Gpu(int(index), name, driver, int(total), int(free), counted))
    return gpus


def read_xids() -> list[tuple[str, int]] | None:
    """GPU and number of each Xid in the kernel's log; None where it may not be read."""
    text = _ask("dmesg", "--notime") or _ask("journalctl", "-k", "-b", "-o", "cat")
    return None if text is None else parse_xids(text)


def parse_xids(text: str) -> list[tuple[str, int]]:
    """PCI address and number, each pair once, in order."""
    found = re.findall(r"NVRM: Xid \((?:PCI:)?([0-9a-fA-F:.]+)\): (\d+)", text)
    return list(dict.fromkeys((place, int(number)) for place, number in found))


def read_dcgm() -> list[str]:
    """Complaints of DCGM's health watches, if it runs here."""
    text = _ask("dcgmi", "health", "--check")
    return parse_dcgm(text) if text is not None else []


def parse_dcgm(text: str) -> list[str]:
    """Its table's lines that report a warning or a failure, in words."""
    lines = [" ".join(line.strip("|+- ").replace("|", " ").split()) for line in text.splitlines()]
    return [line for line in lines if re.search(r"\b(warning|failure)\b", line, re.IGNORECASE)]


def _ask(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
