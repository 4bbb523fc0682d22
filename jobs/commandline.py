"""What all jobs share: a parser that teaches, and errors in one sentence with exit code 2."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from raptide.data.fasta import ReadingRules
from raptide.errors import ConfigError, RaptideError


def job_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the job's own docstring."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="show what Ray and its workers print"
    )
    return parser


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
    """Run a job: a Raptide error is one line on stderr; SIGTERM and hang-up clean up as Ctrl-C."""
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


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
