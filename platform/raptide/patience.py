"""What a file system does not do at first is tried again, unless it says that it never will."""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from raptide.errors import RaptideError, StorageStumbled

TRIES = 5
FIRST_PAUSE_S = 0.2

FINAL = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
}
"""Numbers of errors that no second try mends."""

FINAL_KINDS = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)
"""The same, by type: not everyone who raises them gives the number."""

REFUSALS = re.compile(
    r"AWS Error (ACCESS_DENIED|NO_SUCH_BUCKET|INVALID_ACCESS_KEY_ID|INVALID_CLIENT_TOKEN_ID"
    r"|SIGNATURE_DOES_NOT_MATCH|UNRECOGNIZED_CLIENT)\b|^Bucket '[^']*' not found"
    r"|\b(PERMISSION_DENIED|UNAUTHENTICATED)\b"
)
"""The same, by what pyarrow says of a bucket, whose errors have neither."""

T = TypeVar("T")


class FarTrouble(OSError):
    """What pyarrow says of a bucket, with the number that it did not give: for those who take an
    error without one for damage."""


def patiently(action: Callable[[], T]) -> T:
    """What `action` returns; where the file system stumbles, it is tried again."""
    for pause in _pauses():
        try:
            return action()
        except OSError as error:
            if is_final(error):
                raise
            time.sleep(pause)
    return action()


def read_surely(name: str, action: Callable[[], T]) -> T:
    """What an action that reads an input returns, patiently.

    Raises:
        StorageStumbled: it cannot be read, which may pass.
        RaptideError: it never can be.
    """
    try:
        return patiently(action)
    except OSError as error:
        raise unreadable(name, error) from None


def unreadable(name: str, error: OSError) -> RaptideError:
    return trouble(
        error,
        f"{name} cannot be read ({reason_of(error)}); mend the file system or the permissions, and "
        "start the job again: it goes on where it was.",
    )


def trouble(error: OSError, sentence: str) -> RaptideError:
    """What to raise for an error that stayed through all tries."""
    return RaptideError(sentence) if is_final(error) else StorageStumbled(sentence)


def is_final(error: OSError) -> bool:
    """Whether no second try mends it."""
    if error.errno is None or isinstance(error, FarTrouble):
        return isinstance(error, FINAL_KINDS) or REFUSALS.search(_words(error)) is not None
    return error.errno in FINAL or isinstance(error, FINAL_KINDS)


def reason_of(error: OSError) -> str:
    """In a few words."""
    if error.errno and not isinstance(error, FarTrouble):
        return os.strerror(error.errno)
    return " ".join(_words(error).split())[:200]


def _words(error: OSError) -> str:
    return str(error.strerror or error)


def _pauses() -> Iterator[float]:
    return (FIRST_PAUSE_S * 2**number for number in range(TRIES - 1))
