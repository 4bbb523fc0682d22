"""Which code this is: the package's version, the commit it comes from, and what it runs on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent

VERSION = "RAPTIDE_CODE_VERSION"
"""Variable that tells a submitted job of which commit its checkout is; git does not come along."""

SHOWN = ("numpy", "pyarrow", "httpx", "torch", "ray", "deepspeed", "wandb")


@cache
def commit() -> str:
    """The commit of a checkout (with -dirty if files differ from it), or the one a wheel was built
    from; "" if nobody knows."""
    built = HERE / "commit.txt"
    if built.exists():
        return built.read_text().strip()
    root = HERE.parent.parent
    if not (root / ".git").exists():  # an environment may lie within somebody else's checkout
        return ""
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def code_version() -> str:
    """The package's version, with the commit where it is known."""
    if VERSION in os.environ:
        return os.environ[VERSION]
    version = importlib.metadata.version("raptide")
    return f"{version}+{commit()}" if commit() else version


def hardware() -> str:
    """The processor and the CPUs of this machine."""
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs"


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Of Python and of packages that are installed, by name."""
    found = {name: importlib.metadata.version(name) for name in packages}
    return {"python": platform.python_version()} | found


def describe_versions() -> str:
    """A line for this package, and one for each that results may depend on."""
    lines = [f"raptide {code_version()}", f"python {platform.python_version()}"]
    for name in SHOWN:
        try:
            lines.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{name} not installed")
    return "\n".join(lines)
