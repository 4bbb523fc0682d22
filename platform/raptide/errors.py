"""Everything Raptide raises on purpose.

    RaptideError
    ├── InputError             what the user gave is wrong; jobs end with exit code 2
    │   ├── ConfigError        a recipe, an override or a command-line value
    │   ├── FastaError         a FASTA file, with file and line
    │   ├── SequenceError      one protein sequence given to the engine or the endpoint
    │   ├── CorpusError        a corpus folder: missing, damaged, of another version
    │   ├── BundleError        a model folder: missing or misfit tensors
    │   └── CheckpointError    nothing to resume from, or another stream than before
    └── StreamStalled          no batch arrived in time

Every error carries one sentence: the rule, the value, the place and the remedy.
They take that sentence as their only argument, so Ray can pickle them between processes.
"""

from __future__ import annotations


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


class StreamStalled(RaptideError):
    """No global batch arrived within the time allowed."""


def find_raptide_error(error: BaseException | None) -> RaptideError | None:
    """The first Raptide error in a chain of causes, as Ray wraps what its tasks raise.

    Ray keeps the original under `.cause` (tasks), `.worker_failures` (training) or Python's own
    `__cause__`; all three are followed.
    """
    seen: set[int] = set()
    pending = [error]
    while pending:
        current = pending.pop(0)
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, RaptideError):
            return current
        failures = getattr(current, "worker_failures", None) or {}
        pending += [getattr(current, "cause", None), current.__cause__, *failures.values()]
    return None
