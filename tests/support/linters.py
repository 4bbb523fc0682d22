"""Linters of what is no Python, as the environment has them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path


def linted(program: str, *arguments: str | Path, text: str | None = None) -> str:
    """What a linter finds; "" if it is nothing."""
    path = f"{sys.prefix}/bin{os.pathsep}{os.environ['PATH']}"
    command = [shutil.which(program, path=path) or program, *map(str, arguments)]
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    assert (done.returncode == 0) == (not done.stdout), done.stderr
    return done.stdout
