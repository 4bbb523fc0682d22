"""How long the suite took by folder, against the record in tests/times.json.

Machines differ, so the record is scaled: a folder is named if it takes over a tenth more than what
the median folder says of this machine. Nothing fails on it. `pytest --record-times` writes anew.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent.parent
RECORD = TESTS / "times.json"
MORE = 1.1
LEAST_S = 5.0
"""Folders below it are not judged: theirs is noise."""

_seconds: dict[str, float] = defaultdict(float)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record-times", action="store_true", help="keep the times of this whole suite as record"
    )


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    file = report.nodeid.partition("::")[0]
    folder = Path(file).relative_to("tests").parts[0] if file.startswith("tests/") else file
    _seconds["tests" if folder.endswith(".py") else folder] += report.duration


def grown(found: dict[str, float], record: dict[str, float]) -> dict[str, float]:
    """Folders that take too long, with the seconds that were to be expected on this machine."""
    large = [folder for folder in found if min(found[folder], record.get(folder, 0)) >= LEAST_S]
    if not large:
        return {}
    scale = statistics.median(found[folder] / record[folder] for folder in large)
    expected = {folder: scale * record[folder] for folder in large}
    return {folder: expected[folder] for folder in large if found[folder] > MORE * expected[folder]}


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    found = {folder: round(seconds, 1) for folder, seconds in sorted(_seconds.items())}
    if sum(found.values()) < 60:
        return
    terminalreporter.section("seconds by folder")
    terminalreporter.write_line("  ".join(f"{name} {s:.0f}" for name, s in found.items()))
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if set(record) <= set(found):  # else it was a part of the suite
        for folder, expected in grown(found, record).items():
            terminalreporter.write_line(
                f"tests/{folder} has grown: {found[folder]:.0f} s, where the record and the other "
                f"folders say {expected:.0f} s."
            )
    if config.getoption("record_times"):
        RECORD.write_text(json.dumps(found, indent=1) + "\n")
