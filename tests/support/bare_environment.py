"""An environment that holds one distribution and what it requires, linked from this one."""

import importlib.metadata
import os
import subprocess
import sys
import venv
from pathlib import Path

from packaging.requirements import Requirement


def requirements_of(wheel_metadata):
    """Names of all distributions that a wheel's own, without extras, come down to."""
    pending = list(wheel_metadata.get_all("Requires-Dist", []))
    found = set()
    while pending:
        requirement = Requirement(pending.pop())
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        name = requirement.name.lower().replace("_", "-")
        if name not in found:
            found.add(name)
            pending += importlib.metadata.requires(name) or []
    return found


class BareEnvironment:
    """A virtual environment of its own folder, which sees nothing else."""

    def __init__(self, folder):
        venv.create(folder, symlinks=True)
        self.bin = folder / "bin"
        (self.site,) = folder.glob("lib/*/site-packages")

    def install(self, wheel):
        command = [sys.executable, "-m", "pip", "--python", str(self.bin / "python"), "install"]
        options = ["--no-index", "--no-deps", "--no-compile", "--quiet", str(wheel)]
        subprocess.run([*command, *options], check=True, env={**os.environ, "PYTHONPATH": ""})

    def link(self, names):
        """Link distributions of this environment."""
        for name in names:
            for file in importlib.metadata.files(name):
                top = file.parts[0]
                if top not in ("..", "__pycache__") and not (self.site / top).exists():
                    there = Path(file.locate()).resolve().parents[len(file.parts) - 1] / top
                    (self.site / top).symlink_to(there)

    def run(self, *command, **options):
        """Run something of the environment's; nothing of this one is to be seen."""
        hidden = ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME")
        env = {name: value for name, value in os.environ.items() if name not in hidden}
        return subprocess.run(
            [self.bin / command[0], *map(str, command[1:])],
            capture_output=True,
            text=True,
            env=env,
            **options,
        )
