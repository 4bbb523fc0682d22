"""Print the folders of tests whose code has changed since a commit; all of them if it is unknown.

python .ci/changed_tests.py COMMIT
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ALL = ["tests"]
SHARED = ("support", "chaos", "benchmarks")
"""Folders of tests/ that others import."""


def folders_of(changed: Sequence[str]) -> list[str]:
    """Test folders for changed files, by their paths in the repository."""
    found = set()
    for path in changed:
        parts = Path(path).parts
        if parts[0] == "platform" and len(parts) > 3:
            parts = parts[2:]
        elif parts[0] == "tests" and len(parts) > 2:
            parts = parts[1:]
        if parts[0] in ("docs", "README.md", "CHANGELOG.md"):
            continue
        folder = f"tests/{parts[0]}"
        if parts[0] in SHARED or not (ROOT / folder).is_dir():
            return ALL
        found.add(folder)
    return sorted(found)


def changed_since(commit: str) -> list[str] | None:
    """Files that differ from a commit, or None if git knows of no such commit."""
    if not commit:
        return None
    command = ["git", "diff", "--name-only", commit, "HEAD"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.splitlines() if done.returncode == 0 else None


if __name__ == "__main__":
    changed = changed_since(sys.argv[1].strip() if len(sys.argv) > 1 else "")
    print(*(ALL if changed is None else folders_of(changed)))
