"""Puts the checkout on the path of scripts in this folder, and so of the workers they start."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

for folder in (ROOT / "jobs", ROOT / "tests/support", ROOT / "tests/benchmarks", ROOT):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
