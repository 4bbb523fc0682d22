"""What all jobs share: a parser that teaches, and errors in one sentence with exit code 2."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable
from types import FrameType

from raptide.errors import RaptideError


def job_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the job's own docstring."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="show what Ray and its workers print"
    )
    return parser


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
