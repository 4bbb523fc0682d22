"""What the scripts here and in tests/chaos share: they start with checks and end with a report.

In its first second, before anything heavy is imported or started, a script refuses what would stop
it later: a package that is not there, an input or a folder that is missing, too little room, a file
for the report that is no report. What it finds goes into its report part by part. However the
script ends, the report is shown and written; a part that failed is named in it, with the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from machine import describe_machine

ROOT = Path(__file__).resolve().parents[2]
for folder in ("jobs", "tests/support"):
    if str(ROOT / folder) not in sys.path:
        sys.path.append(str(ROOT / folder))

from commandline import run_job  # noqa: E402
from processes import no_orphans  # noqa: E402
from raptide.errors import ConfigError, find_raptide_error  # noqa: E402

EXTRAS = {
    "datasets": ("datasets", "bench"),
    "esm": ("fair-esm", "dev"),
    "pyhmmer": ("pyhmmer", "dev"),
    "schemathesis": ("schemathesis", "dev"),
    "transformers": ("transformers", "dev"),
}
"""Modules that only scripts and tests need: each one's package, and the extra that installs it."""


def run_script(main: Callable[[], int | None]) -> None:
    """Run a script as a job is run, with what it returns for its exit code."""
    run_job(lambda: sys.exit(main()))


def script_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the script's own docstring."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def parse(parser: argparse.ArgumentParser, quick: dict[str, Any]) -> argparse.Namespace:
    """The command line, with --json and --quick added.

    Args:
        quick: options that --quick gives other defaults, by name; what is given still counts.
    """
    options = " ".join(_as_typed(name, value) for name, value in quick.items())
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the report here")
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"all of it with smaller numbers, in at most 8 minutes on two slow cores: {options}",
    )
    args, _ = parser.parse_known_args()
    assert quick.keys() <= vars(args).keys()
    if args.quick:
        parser.set_defaults(**quick)
    return parser.parse_args()


def _as_typed(name: str, value: Any) -> str:
    values = value if isinstance(value, (list, tuple)) else [value]
    return " ".join([f"--{name.replace('_', '-')}", *map(str, values)])


def lacks(module: str) -> str | None:
    """Why a module of EXTRAS cannot be used here, with the remedy, or None if it can."""
    if find_spec(module) is not None:
        return None
    package, extra = EXTRAS[module]
    return (
        f"the package {package} is not installed in {sys.prefix}; "
        f"install it with: pip install -c constraints.txt -e '.[{extra}]'"
    )


def need_packages(*modules: str) -> None:
    """Refuse to go on without these modules of EXTRAS."""
    for module in modules:
        if (why := lacks(module)) is not None:
            raise ConfigError(f"This cannot run: {why}")


def need_file(path: Path, option: str) -> None:
    """Refuse an input that cannot be read."""
    if not path.is_file() or not os.access(path, os.R_OK):
        raise ConfigError(
            f"{option} must be a file that can be read, and {path} is none; give another path."
        )


def need_place(path: Path, option: str) -> None:
    """Refuse an output file that cannot be written: its folder is not there, or read-only."""
    folder = path.absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(
            f"{option} {path} must lie in a folder that can be written to, and {folder} is none; "
            "make it or choose another place."
        )
    if path.exists() and not (path.is_file() and os.access(path, os.W_OK)):
        raise ConfigError(
            f"{option} must be a file that can be written, and {path} is none; choose another path."
        )


def need_environment(folder: Path, option: str) -> None:
    """Refuse a folder that a virtual environment neither is in nor can be made in."""
    empty = folder.is_dir() and not any(folder.iterdir())
    if folder.exists() and not (empty or (folder / "bin/python").exists()):
        raise ConfigError(
            f"{option} must be a virtual environment or a new folder, and {folder} is neither; "
            "choose another place."
        )
    if not folder.exists():
        need_place(folder, option)


def need_room(gigabytes: float, folder: Path | None = None, option: str = "TMPDIR") -> None:
    """Refuse a folder for passing files (by default the system's) that is missing or too full."""
    place = folder or Path(tempfile.gettempdir())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise ConfigError(
            f"{option} must be a folder that can be written to, and {place} is none; "
            "make it or choose another."
        )
    free = shutil.disk_usage(place).free / 1e9
    if free < gigabytes:
        raise ConfigError(
            f"{gigabytes:,.1f} GB must be free for passing files, and {place} has {free:,.1f}; "
            f"make room or name another folder with {option}."
        )


def print_report(report: dict[str, Any]) -> None:
    """Of a script whose figures need no table."""
    print(json.dumps(report, indent=1))


class Report(dict[str, Any]):
    """What a script has found, in JSON's terms; shown and written however the block ends.

    Nothing that is started within the block outlives it.

        with Report("bench_x", args, PACKAGES, show) as report:
            with report.part("speed"):
                report["speed"] = measure_speed()

    A file that holds a report of the same script is replaced, or added to.

    Args:
        show: prints a report, of which any part may be missing.
        ratios: what follows from the parts that there are, kept under that name.
        adds: parts that are not run are kept from the report that the file holds.

    Raises:
        ConfigError: --json cannot be written, or holds something else.
    """

    def __init__(
        self,
        script: str,
        args: argparse.Namespace,
        packages: Sequence[str],
        show: Callable[[dict[str, Any]], None],
        ratios: Callable[[dict[str, Any]], dict[str, float]] | None = None,
        *,
        adds: bool = False,
    ) -> None:
        self._file: Path | None = args.json
        self._children = no_orphans()
        self._packages, self._show, self._ratios = packages, show, ratios
        former = {} if args.json is None else _former(args.json, script, args.quick)
        super().__init__(former if adds else {})
        self.pop("broke_off", None)
        self |= {"script": script, "quick": args.quick, "left_out": {}}

    def leave_out(self, what: str, why: str) -> None:
        """Note what is not measured here."""
        print(f"{what} is left out: {why}", flush=True)
        self["left_out"][what] = why

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What the report gets within the block is written at its end; what ends it is noted."""
        self.pop(name, None)
        try:
            yield
        except BaseException as error:
            self["broke_off"] = {"part": name, "why": _reason(error)}
            raise
        finally:
            self._write()

    def __enter__(self) -> Report:
        self._children.__enter__()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None and not isinstance(error, SystemExit):
            self.setdefault("broke_off", {"part": "start or end", "why": _reason(error)})
        self._write()
        self._show(self)
        if self["quick"]:
            print("A quick run: its numbers are too small for figures to be quoted.")
        for what, why in self["left_out"].items():
            print(f"Left out: {what}: {why}")
        if end := self.get("broke_off"):
            print(f"Broke off: {end['part']}: {end['why']}; what came before it is above.")
        sys.stdout.flush()
        self._children.__exit__(kind, error, trace)

    def _write(self) -> None:
        if self._ratios is not None:
            self["ratios"] = self._ratios(self)
        self["machine"] = describe_machine(*self._packages)
        if self._file is not None:
            passing = self._file.with_name(f".{self._file.name}.new")
            passing.write_text(json.dumps(self, indent=1) + "\n")
            passing.replace(self._file)


def _former(file: Path, script: str, quick: bool) -> dict[str, Any]:
    """The report that a file holds; none yet if it is missing or empty."""
    need_place(file, "--json")
    if not file.exists() or not file.stat().st_size:
        return {}
    try:
        found = json.loads(file.read_bytes())
    except ValueError:
        found = None
    if not isinstance(found, dict) or found.get("script") != script:
        raise ConfigError(
            f"--json must name a new file or a report of {script}, and {file} holds something "
            "else; choose another path or remove it."
        )
    if found.get("quick") != quick:
        kinds = ("a whole run", "a quick run")
        raise ConfigError(
            f"--json must not mix quick and whole runs, and {file} holds {kinds[not quick]}; "
            "choose another path or remove it."
        )
    return found


def _reason(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    known = find_raptide_error(error)
    if known is not None:
        return str(known)
    # Of what Ray wraps, the last line says what happened; all of it follows as a traceback.
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1]}"
