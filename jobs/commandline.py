"""What all jobs share: a parser that teaches, and errors in one sentence with exit code 2."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import signal
import sys
from collections.abc import Callable, Container
from pathlib import Path
from types import FrameType
from typing import Any

from raptide.__main__ import short_name
from raptide.data.fasta import ReadingRules
from raptide.errors import ConfigError, RaptideError, find_os_error
from raptide.patience import reason_of


class JobParser(argparse.ArgumentParser):
    """Help that begins with examples and names every default; the nearest name for a wrong one."""

    stops_at: Container[str] = ()
    """Words behind which options are another job's."""

    def __init__(self, verbose: bool = True, **options: Any) -> None:
        super().__init__(formatter_class=JobHelp, **options)
        # No option is a number, so a list that begins with a negative one is a value.
        self._negative_number_matcher = re.compile(r"-\d+(?:\.\d*)?(?:,-?\d+)*$")
        if not verbose:
            return
        self.add_argument(
            "-v", "--verbose", action="store_true", help="show what Ray and its workers print"
        )

    def format_help(self) -> str:
        """What the job is for, with examples; then its options."""
        description, self.description = self.description, None
        try:
            options = super().format_help()
        finally:
            self.description = description
        return f"{as_called((description or '').strip())}\n\n{options}"

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        given = sys.argv[1:] if args is None else list(args)
        self._refuse_unknown(given)
        return super().parse_known_args(given, namespace)

    def _refuse_unknown(self, given: list[str]) -> None:
        """Before argparse looks: it would complain of what is missing, not of a slip beside it."""
        known = [name for name in self._option_string_actions if name.startswith("--")]
        for word in given:
            if word == "--" or word in self.stops_at:
                break
            name = word.partition("=")[0]
            if not name.startswith("--") or any(each.startswith(name) for each in known):
                continue
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else "--help lists what there is."
            self.error(f"there is no option {name}; {hint}")


class JobHelp(argparse.RawDescriptionHelpFormatter):
    """Each default that a help does not tell itself."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        told, default = action.help or "", action.default
        plain = isinstance(default, str | int | float | Path)
        hidden = default in (False, argparse.SUPPRESS)
        if not action.option_strings or not plain or hidden or "default" in told:
            return told
        return f"{told} (default: %(default)s)"


def job_parser(description: str | None, verbose: bool = True) -> JobParser:
    """A parser whose help is the job's own docstring.

    Args:
        verbose: whether Ray and workers print what an option may show.
    """
    command = called_as()
    return JobParser(verbose, description=description, **({"prog": command} if command else {}))


def called_as() -> str | None:
    """`raptide NAME` where that was called, None where the script was."""
    return getattr(sys.modules["__main__"], "__command__", None)


def as_called(text: str) -> str:
    """A text with commands for people to copy, written as they have called this one."""
    if called_as() is None:
        return text
    shipped = re.sub(r"jobs/(?:recipes/scaling|recipes|benchmarks)/(\w+)\.yaml", r"\1", text)
    return re.sub(
        r"python jobs/(\w+)\.py", lambda found: f"raptide {short_name(found[1])}", shipped
    )


def shipped_file(given: Path, folder: str) -> Path:
    """A file that comes with the jobs by its name alone: `demo` is recipes/demo.yaml.

    Args:
        folder: "recipes" or "benchmarks".

    Raises:
        ConfigError: there is no such file, neither as a path nor by that name.
    """
    if given.exists() or len(given.parts) > 1:
        return given
    here = Path(__file__).parent / folder
    for name in (given.name, f"{given.name}.yaml"):
        if (here / name).is_file():
            return here / name
    if given.suffix:  # meant as a file: whoever reads it says what is wrong
        return given
    known = sorted(path.stem for path in here.glob("*.yaml"))
    close = difflib.get_close_matches(given.stem, known, n=1)
    hint = (
        f"did you mean {close[0]}?" if close else f"{folder} that come along: {', '.join(known)}."
    )
    raise ConfigError(f"There is no file {given}; {hint}")


def add_reading_options(parser: argparse.ArgumentParser) -> None:
    """Options for records that are no proteins as they stand; `reading_rules` reads them."""
    defaults = ReadingRules()
    group = parser.add_argument_group(
        "records that are no proteins", "refused with file and line unless you say otherwise"
    )
    group.add_argument(
        "--stop-codons",
        choices=("refuse", "drop", "split"),
        default=defaults.stop_codons,
        help="records with an inner * or .; split cuts them there into NAME/START-END",
    )
    group.add_argument(
        "--bad-letters",
        choices=("refuse", "drop"),
        default=defaults.bad_letters,
        help="records with digits, gaps or anything else that is no letter",
    )
    group.add_argument(
        "--nucleotides",
        choices=("refuse", "drop", "keep"),
        default=defaults.nucleotides,
        help="records of DNA or RNA (PDB's mol:na, or nearly all ACGTUN); keep takes them for "
        "proteins, such as poly-GA",
    )


def reading_rules(args: argparse.Namespace) -> ReadingRules:
    return ReadingRules(
        stop_codons=args.stop_codons,
        bad_letters=args.bad_letters,
        nucleotides=args.nucleotides,
    )


JOB_COPY = "runtime_resources/working_dir_files"
"""In the path of each copy of a checkout that Ray makes for a submitted job."""


def refuse_output(path: Path, option: str) -> None:
    """Before anything starts: a place that nothing can be written to is no output.

    Raises:
        ConfigError: it, or the nearest folder above it that exists, cannot be written to; or it
            lies in a submitted job's copy of the checkout, which goes away with the job.
    """
    if JOB_COPY in str(path.absolute()):
        raise ConfigError(
            f"{option} {path} would lie in this job's copy of the checkout, which Ray deletes; "
            "give the absolute path of a folder that every node sees."
        )
    folder = next(each for each in (path, *path.absolute().parents) if each.exists())
    if folder != path and not folder.is_dir():
        raise ConfigError(
            f"{option} {path} lies below {folder}, which is a file; choose another place."
        )
    if not os.access(folder, os.W_OK):
        raise ConfigError(
            f"{option} {path} cannot be written ({folder} is read-only for this user); choose "
            "another place or change its permissions."
        )


def run_job(main: Callable[[], None]) -> None:
    """Run a job: a Raptide error is one line on stderr, and so is what a file system refuses;
    SIGTERM and hang-up clean up as Ctrl-C."""
    # SIGINT too: where a script starts a job with `&`, it would be ignored, also by the children.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        main()
    except RaptideError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if (refused := find_os_error(error)) is None:
            raise
        place = f" at {refused.filename}" if refused.filename else ""
        print(
            f"error: The system refused{place} ({reason_of(refused)}); see to that, and give the "
            "command again.",
            file=sys.stderr,
        )
        sys.exit(RaptideError.exit_code)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
