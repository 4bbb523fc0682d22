"""The processes of a run that are alive."""

from __future__ import annotations

import psutil


def training_processes(titles: tuple[str, ...] = ("ray::RayTrainWorker",)) -> list[int]:
    """Process ids of those that this process's own Ray has started, in order.

    Args:
        titles: how the titles begin of the processes that are asked for; the training workers.
    """
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            command = process.cmdline()
        except psutil.Error:  # it is just ending
            continue
        if command and command[0].startswith(titles):
            found.append(process.pid)
    return sorted(found)
