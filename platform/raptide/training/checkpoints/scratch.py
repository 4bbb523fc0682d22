"""Node-local scratch of a run; checkpoints pass through it, so nobody else may write there."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from raptide.errors import CheckpointError


def scratch_folder(run_id: str, name: str, *, empty: bool = False) -> Path:
    """The folder `name` of a run's scratch on this node.

    Args:
        empty: remove what an earlier, killed worker left there.

    Raises:
        CheckpointError: the scratch belongs to, or can be written by, another user.
    """
    root = Path(tempfile.gettempdir()) / f"raptide-{os.getuid()}"
    root.mkdir(mode=0o700, exist_ok=True)
    status = root.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise CheckpointError(
            f"{root} belongs to, or can be written by, someone else; remove it, since checkpoints "
            "pass through it."
        )
    folder = root / run_id / name
    if empty:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def made_once(run_id: str, kind: str, name: str, make: Callable[[Path], None]) -> Path:
    """A folder of this node's scratch that its first caller makes and all share.

    It is kept until another name is asked for under the same kind.

    Args:
        make: fills the folder that it is given, which does not exist yet.
    """
    cache = scratch_folder(run_id, kind)
    target = cache / name
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            for other in cache.iterdir():
                if other.is_dir():
                    shutil.rmtree(other)
            # A name of its own: a killed worker's child may still be writing to the last one.
            partial = Path(tempfile.mkdtemp(prefix="partial-", dir=cache)) / name
            make(partial)
            partial.rename(target)
    return target
