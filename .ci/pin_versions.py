"""Make constraints.txt anew, or see what the newest of everything would do.

    python .ci/pin_versions.py                          the newest versions, into constraints.txt
    python .ci/pin_versions.py --keep                   add what is missing, change nothing else
    python .ci/pin_versions.py --try-newest report.md   install the newest, run the checks, report

Every version that `pip install -e '.[dev]'` comes down to is asked of pip (a dry run: nothing is
installed), for this interpreter. torch's own CUDA packages are left out, as they follow torch, and
so are build tools that pip takes for itself. For another Python version run it with --keep and that
interpreter: one file serves all, so a version that one of them lacks must be chosen by hand.

--try-newest installs without constraints into an environment of its own, runs lint, types and the
quick tests with it, and writes what is newer than constraints.txt and what failed, with its output.
It changes nothing and ends with 1 if anything failed; it takes an installation and the tests.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "constraints.txt"
HEADER = """\
# Exact versions of everything that `make install` may bring; torch's CUDA packages follow torch.
# Made by .ci/pin_versions.py, which says how.
"""
LEFT_OUT = re.compile(r"(nvidia|cuda|triton)\b.*|pip|setuptools|wheel|raptide")

CHECKS = {
    "lint": ["ruff", "check", "."],
    "types": ["mypy"],
    "tests": ["pytest", "-m", "not thorough", "-q"],
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keep", action="store_true", help="change no version that stands there")
    parser.add_argument("--try-newest", type=Path, metavar="REPORT", help="Markdown to write")
    args = parser.parse_args()
    if args.try_newest:
        return try_newest(args.try_newest)
    before = read(FILE)
    versions = resolve(FILE if args.keep else None)
    kept = before if args.keep else {}
    FILE.write_text(HEADER + "".join(f"{n}=={v}\n" for n, v in sorted((versions | kept).items())))
    print(f"{FILE}: {len(versions | kept)} versions\n{difference(before, versions | kept)}")
    return 0


def read(file: Path) -> dict[str, str]:
    """The versions that a file of constraints gives, by plain name."""
    lines = [line.partition("#")[0].strip() for line in file.read_text().splitlines()]
    return {_plain(name): version for name, version in (x.split("==") for x in lines if x)}


def resolve(constraints: Path | None) -> dict[str, str]:
    """What pip would install of `.[dev]`, by plain name."""
    limits = ["--constraint", str(constraints)] if constraints else []
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        options = ["--dry-run", "--ignore-installed", "--quiet", "--report", report.name, *limits]
        command = [sys.executable, "-m", "pip", "install", *options, f"{ROOT}[dev]"]
        subprocess.run(command, check=True)
        found = json.loads(Path(report.name).read_text())["install"]
    versions = {_plain(e["metadata"]["name"]): e["metadata"]["version"] for e in found}
    return {name: v for name, v in versions.items() if not LEFT_OUT.fullmatch(name)}


def difference(before: dict[str, str], after: dict[str, str]) -> str:
    """A line for each version that is another, new or gone."""
    names = sorted(name for name in before | after if before.get(name) != after.get(name))
    return "\n".join(f"  {n}: {before.get(n, 'none')} -> {after.get(n, 'none')}" for n in names)


def _plain(name: str) -> str:
    """As packages' names are compared: pip reports Flask where a file says flask."""
    return re.sub(r"[-_.]+", "-", name).lower()


def try_newest(report: Path) -> int:
    """Install the newest of everything, check it, and write what came of it."""
    with tempfile.TemporaryDirectory() as folder:
        python = Path(folder) / "bin/python"
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        outcomes = {"install": run([python, "-m", "pip", "install", "--quiet", "-e", ".[dev]"])}
        newest = {}
        if outcomes["install"][0] == 0:
            outcomes |= {n: run([python, "-m", *command]) for n, command in CHECKS.items()}
            listing = subprocess.check_output([python, "-m", "pip", "list", "--format", "json"])
            newest = {_plain(each["name"]): each["version"] for each in json.loads(listing)}
            newest = {n: v for n, v in newest.items() if not LEFT_OUT.fullmatch(n)}
    report.write_text(describe(outcomes, newest))
    print(
        f"{report}: "
        + ", ".join(f"{n} {'ok' if not o[0] else 'FAILED'}" for n, o in outcomes.items())
    )
    return int(any(code for code, _, _ in outcomes.values()))


def run(command: list[object]) -> tuple[int, str, float]:
    """Exit code, the end of what was printed, and seconds."""
    started = time.monotonic()
    done = subprocess.run(
        [str(each) for each in command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    last = "\n".join((done.stdout + done.stderr).splitlines()[-60:])
    return done.returncode, last, time.monotonic() - started


def describe(outcomes: dict[str, tuple[int, str, float]], newest: dict[str, str]) -> str:
    lines = [
        f"# The newest of everything, {time.strftime('%Y-%m-%d')}, Python {sys.version[:6]}",
        "",
    ]
    lines += ["| | | s |", "|---|---|---|"]
    lines += [
        f"| {n} | {'ok' if not c else 'FAILED'} | {s:.0f} |" for n, (c, _, s) in outcomes.items()
    ]
    lines += ["", "Versions that differ:", "", difference(read(FILE), newest) if newest else ""]
    for name, (code, last, _) in outcomes.items():
        lines += ["", f"## {name}", "", "```", last, "```"] if code else []
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
