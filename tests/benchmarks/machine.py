"""What a benchmark ran on: measured figures mean nothing without it."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8")


def describe_machine(*packages: str) -> dict[str, object]:
    """Processor, cores, memory, versions of the packages, and the command."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fields = dict(
        (part.strip() for part in line.split(":", 1)) for line in info.splitlines() if ":" in line
    )
    held = set(fields.get("flags", "").split())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": fields.get("model name", platform.processor()),
        "flags": [flag for flag in FLAGS if flag in held],
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(memory / 1e9),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
        "command": " ".join(["python", *sys.argv]),
    }


def publish(
    report: dict[str, Any],
    packages: Sequence[str],
    show: Callable[[dict[str, Any]], None],
    file: Path | None,
) -> None:
    """Add the machine to a benchmark's report, show it, and write it to a JSON file, if any."""
    report["machine"] = describe_machine(*packages)
    show(report)
    if file is not None:
        file.write_text(json.dumps(report, indent=1) + "\n")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
