"""Which process of the suite runs which tests: a folder's share a Ray and fixtures, in order."""

from __future__ import annotations

from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

PARTS = [
    "training",
    "chaos",
    "jobs",
    "bulk",
    "evaluation",
    "scaling",
    "operations",
    "serve",
    "data",
    "inference",
    "model",
    "gpu",
    "packaging",
    "deploy",
    "client",
    "tests",
]
"""In the order in which they are begun, the longest first. Serve takes cores of its process's Ray
to the end, so it comes late: the other process takes what follows and needs Ray, the data."""


def part_of(nodeid: str) -> str:
    folders = nodeid.partition("::")[0].split("/")[1:-1]
    if "/test_chaos.py" in nodeid:  # it has a cluster of its own
        return "chaos"
    if "/test_export.py" in nodeid:  # of the run that all of training looks at
        return "training"
    return folders[0] if folders else "tests"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: PARTS.index(part_of(item.nodeid)))


class ByPart(LoadScopeScheduling):
    """A part at a time for each process."""

    def _split_scope(self, nodeid: str) -> str:
        return part_of(nodeid)


@pytest.hookimpl(optionalhook=True)  # xdist's, which `-p no:xdist` leaves out
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByPart:
    return ByPart(config, log)
