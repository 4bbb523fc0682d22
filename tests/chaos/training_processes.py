"""The training workers that are running."""

from __future__ import annotations

import psutil


def training_processes() -> list[int]:
    """Process ids of the workers that this process's own Ray has started, in order."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            command = process.cmdline()
        except psutil.Error:  # it is just ending
            continue
        if command and command[0].startswith("ray::RayTrainWorker"):
            found.append(process.pid)
    return sorted(found)
