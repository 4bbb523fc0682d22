"""Everything Raptide raises on purpose.

    RaptideError
    ├── InputError             what the user gave is wrong; jobs end with exit code 2
    │   ├── ConfigError        a recipe, an override or a command-line value
    │   ├── FastaError         a FASTA file, with file and line
    │   ├── SequenceError      one protein sequence given to the engine or the endpoint
    │   ├── CorpusError        a corpus folder: missing, damaged, of another version
    │   ├── BundleError        a model folder: missing or misfit tensors
    │   └── CheckpointError    nothing to resume from, or another stream than before
    ├── FetchError             a download broke off for good, or arrived damaged
    ├── ServiceError           an endpoint cannot be reached, stays full or fails
    ├── ClusterError           a cluster does not answer, lost a job, or is not fit to train on
    ├── PassingTrouble         may be over at the next try: a run starts its workers again
    │   ├── StreamStalled      no batch arrived in time
    │   └── StorageStumbled    a file system failed again and again
    ├── Superseded             another attempt at the same run or build has taken over
    ├── TrainingDiverged       the loss is no number any more
    ├── CheckpointUnsaved      a checkpoint could not be saved, and the recipe says to stop then
    └── OutOfMemory            a worker's device was too small, with the setting to lower

Every error carries one sentence: the rule, the value, the place and the remedy.
They take that sentence as their only argument, so Ray can pickle them between processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class RaptideError(Exception):
    """Base of everything Raptide raises on purpose."""

    exit_code = 1


class InputError(RaptideError):
    """What the user gave is wrong; the message says how to put it right."""

    exit_code = 2


class ConfigError(InputError):
    """A recipe, an override or a command-line value is wrong."""


class FastaError(InputError):
    """A FASTA file cannot be read as proteins."""


class SequenceError(InputError):
    """A protein sequence cannot be encoded, or is too long."""


class CorpusError(InputError):
    """A corpus folder is missing, damaged or of another format version."""


class BundleError(InputError):
    """A model folder is missing a file or a tensor, or holds one too many."""


class CheckpointError(InputError):
    """A run cannot be resumed as asked."""


class FetchError(RaptideError):
    """A file could not be downloaded whole."""


class ServiceError(RaptideError):
    """An endpoint cannot be reached, stays full or fails."""


class ClusterError(RaptideError):
    """A cluster does not answer, has lost a job, or is not fit to train on."""


class PassingTrouble(RaptideError):
    """May be over at the next try."""


class StreamStalled(PassingTrouble):
    """No global batch arrived within the time allowed."""


class StorageStumbled(PassingTrouble):
    """A file system failed again and again, and does not say that it always will."""


class Superseded(RaptideError):
    """Another attempt at the same run or build has taken over."""


class TrainingDiverged(RaptideError):
    """The loss was NaN or infinite for too many steps in a row."""


class CheckpointUnsaved(RaptideError):
    """A checkpoint could not be written to the run's storage."""


class OutOfMemory(RaptideError):
    """A worker ran out of memory."""


def behind(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it was raised for, nearest first.

    Ray keeps the original under `.cause` (tasks) or `.worker_failures` (training).
    """
    pending = [error]
    while pending:
        current = pending.pop(0)
        if current is not None:
            yield current
            failures = getattr(current, "worker_failures", None) or {}
            pending += [getattr(current, "cause", None), *failures.values(), current.__cause__]


def find_raptide_error(error: BaseException | None) -> RaptideError | None:
    """The Raptide error behind what Ray raises for a failed task or worker, or None.

    From Ray Data it comes only out of functions that are generators, with advice of Ray's appended.
    Our messages are one line, so that is cut off again.
    """
    for found in behind(error):
        if isinstance(found, RaptideError) and getattr(found, "cause", None) is None:
            return type(found)(str(found).split("\n")[0])
    return None


def find_os_error(error: BaseException | None) -> OSError | None:
    """What a file system or a network has complained of behind an error, with a number; or None."""
    for found in behind(error):
        if isinstance(found, OSError) and found.errno:
            return found
    return None


@contextmanager
def plain_errors() -> Iterator[None]:
    """Within the block, a Raptide error that Ray has wrapped is raised as itself."""
    try:
        yield
    except Exception as error:
        if (cause := find_raptide_error(error)) is not None:
            raise cause from None
        raise
