"""The command `raptide`: every job, and the endpoint, under one name.

    raptide build-corpus --input my.fasta --output corpora/mine
    raptide pretrain --config demo --output runs/mine corpus=corpora/mine
    raptide serve model=runs/mine

`raptide COMMAND --help` tells of each. `python jobs/NAME.py` in a checkout is the same.
"""

from __future__ import annotations

import ast
import difflib
import os
import runpy
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from typing import NoReturn

from raptide.errors import ConfigError
from raptide.version import describe_versions

HERE = Path(__file__).parent
JOBS = HERE / "jobs" if (HERE / "jobs").exists() else HERE.parent.parent / "jobs"
"""In a wheel, and in a checkout."""

MODULES = {"serve": "serve", "serve-keys": "serve.keys"}
"""Commands that are modules, and no scripts."""

OBJECTS = ("_model", "_proteins")
"""What commands are about unless they say something else: `pretrain` is pretrain_model."""


def main() -> None:
    """Run a command as if its script, or module, had been called."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
    elif arguments[0] in ("-V", "--version", "version"):
        print(describe_versions())
    else:
        try:
            run(arguments[0], arguments[1:])
        except ConfigError as error:
            _refuse(str(error))
        except ModuleNotFoundError as error:
            _refuse(_name_what_is_missing(arguments[0], error))


def run(command: str, arguments: list[str]) -> None:
    """Run a command in this process.

    Raises:
        ConfigError: there is none of that name.
        ModuleNotFoundError: it needs a package that is not installed.
    """
    scripts = jobs()
    if command in MODULES:
        _refuse_another_serve()
        sys.argv = [f"raptide {command}", *arguments]
        runpy.run_module(MODULES[command], run_name="__main__")
        return
    full = {path.stem.replace("_", "-"): path for path in scripts.values()}
    script = scripts.get(command) or full.get(command)
    if script is None:
        known = [*scripts, *MODULES]
        close = difflib.get_close_matches(command, [*known, *full], n=1)
        hint = f"did you mean `{close[0]}`?" if close else f"there are {', '.join(known)}."
        raise ConfigError(f"There is no command `{command}`; {hint}")
    sys.argv = [str(script), *arguments]
    sys.path[0] = str(JOBS)  # as Python does for a script: jobs import each other by name
    names = {"__command__": f"raptide {command}"}
    runpy.run_path(str(script), init_globals=names, run_name="__main__")


def _refuse_another_serve() -> None:
    """Deployment files import `serve`, which is nobody's by right.

    Raises:
        ConfigError: what Python finds by that name is not ours.
    """
    root = HERE.parent if (HERE / "jobs").exists() else JOBS.parent
    # Ray's workers look into the folder that this was started in first.
    found = PathFinder.find_spec("serve", [os.getcwd(), *sys.path, str(root)])
    place = Path(found.origin).resolve() if found and found.origin else None
    if place != (root / "serve/__init__.py").resolve():
        raise ConfigError(
            f"The package `serve` is found at {place}, which hides the endpoint's in {root}; start "
            "in another folder, or uninstall it."
        )
    if str(root) not in sys.path:
        sys.path.append(str(root))


def jobs() -> dict[str, Path]:
    """The jobs by the short names of their commands."""
    return {
        short_name(path.stem): path
        for path in sorted(JOBS.glob("*.py"))
        if 'if __name__ == "__main__"' in path.read_text()
    }


def short_name(job: str) -> str:
    """A job's command."""
    for ending in OBJECTS:
        job = job.removesuffix(ending)
    return job.removeprefix("run_").replace("_", "-")


def overview() -> str:
    """What there is, a line a command."""
    lines = [
        (name, (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0])
        for name, path in jobs().items()
    ]
    lines += [
        ("serve", "Deploy a model, or a file of Ray Serve, and drain at the end."),
        ("serve-keys", "Make an API key."),
    ]
    width = max(len(name) for name, _ in lines)
    shown = "\n".join(f"  {name:{width}}  {text}" for name, text in lines)
    return f"usage: raptide COMMAND …\n\n{shown}\n\nraptide COMMAND --help, raptide --version"


def _refuse(sentence: str) -> NoReturn:
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(2)


def _name_what_is_missing(command: str, error: ModuleNotFoundError) -> str:
    package = (error.name or "").split(".")[0]
    if not package or package in sys.stdlib_module_names or package in ("raptide", "serve"):
        raise error
    extra = "serve" if command.startswith(("serve", "load", "deploy")) else "train"
    return (
        f"`raptide {command}` needs the package {package}, which is not installed: "
        f"pip install 'raptide[{extra}]', or 'raptide[all]' for everything."
    )


if __name__ == "__main__":
    main()
