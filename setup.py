"""What a wheel holds beside the library: jobs/ as raptide/jobs, serve/, and its commit.

Jobs are scripts that import each other by name: they lie in a folder of the library's, and take no
name at the top. `serve` is the name that deployment files import.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).parent
COMMIT = "platform/raptide/commit.txt"
"""In an sdist, which has no history."""


def commit() -> str:
    """The commit that is built, with -dirty if files differ from it; "" if nobody knows."""
    if (ROOT / COMMIT).exists():
        return (ROOT / COMMIT).read_text()
    if not (ROOT / ".git").exists():
        return ""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()


class BuildWithCommit(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            Path(self.build_lib, "raptide/commit.txt").write_text(commit())


class SdistWithCommit(sdist):
    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        Path(base_dir, COMMIT).write_text(commit())


setup(
    packages=[*find_packages("platform"), *find_packages(".", include=["serve*"]), "raptide.jobs"],
    package_dir={"": "platform", "raptide.jobs": "jobs", "serve": "serve"},
    cmdclass={"build_py": BuildWithCommit, "sdist": SdistWithCommit},
)
