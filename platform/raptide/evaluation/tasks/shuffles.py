"""Random orders that are the same everywhere and for ever: by hash of what is ordered."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np


def order_by_hash(scope: str, names: Sequence[str], key: str) -> np.ndarray:
    """A permutation of `names`, [n] int64; each `key` gives another.

    Args:
        scope: what the names are names in, such as an assay.
    """
    start = hashlib.blake2b(f"{key}\0{scope}\0".encode(), digest_size=8)
    hashes = np.empty(len(names), np.uint64)
    for index, name in enumerate(names):
        mine = start.copy()
        mine.update(name.encode())
        hashes[index] = int.from_bytes(mine.digest(), "little")
    return np.argsort(hashes, kind="stable")
