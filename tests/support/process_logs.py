"""What Ray, Serve and workers wrote while a test failed, below its own report.

Ray's processes write into files of their own, so a traceback of the test alone seldom says why.
"""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

LINES = 40
MOST_FILES = 12
TROUBLE = re.compile(r"Traceback|Error|ERROR|CRITICAL|Fatal|killed|SIG[A-Z]{3}")
PATTERNS = ("*.err", "*.out", "ray-train-app-*.log", "serve/*.log", "*controller*.log")

_began: dict[str, float] = {}


def pytest_runtest_logstart(nodeid: str) -> None:
    _began.clear()
    _began[nodeid] = time.time()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        began = _began.get(item.nodeid, time.time())
        for file, tail in written_since(began):
            report.sections.append((f"process log {file}", tail))
    return report


def written_since(began: float) -> Iterator[tuple[str, str]]:
    """Name and last lines of the logs that have been written to, those with trouble first."""
    found = []
    folder = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir(), "ray")
    for session in folder.glob("session_20*"):
        for file in {file for pattern in PATTERNS for file in session.glob(f"logs/{pattern}")}:
            if file.stat().st_mtime >= began and (tail := last_lines(file)):
                found.append((not TROUBLE.search(tail), -file.stat().st_mtime, file, tail))
    for _, _, file, tail in sorted(found)[:MOST_FILES]:
        yield f"{file.parent.parent.name}/{file.name}", tail


def last_lines(file: Path) -> str:
    with file.open("rb") as content:
        content.seek(max(0, file.stat().st_size - 20_000))
        lines = content.read().decode("utf-8", "replace").splitlines()
    return "\n".join(lines[-LINES:]).strip()
