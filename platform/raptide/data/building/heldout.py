"""Lists of what is to be held out: names of clusters, or of members whose clusters are meant.

They are read as their authors publish them. A list has millions of names: what comes after reading
goes by hashes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raptide.data.building.records import is_listed, listed_hashes
from raptide.data.compressed import open_plain
from raptide.errors import ConfigError, InputError

READ_BYTES = 8 << 20

FASTA_HEADER = r"^>\s*(\S+).*$"
UNIREF_HEADER = r"^(UniRef\d+_\S+)\s.*$"


def read_list(path: str | Path) -> pa.ChunkedArray:
    """The names in a file, plain or compressed, one a line; also a pipe.

    Of FASTA headers (`>name description`) and of UniRef's, with or without the `>`, the name is
    taken; any other line is a name as it stands, blanks included.

    Raises:
        ConfigError: the file cannot be read, or holds no name.
    """
    chunks = []
    try:
        with open_plain(path) as file:
            while lines := file.readlines(READ_BYTES):
                chunks.append(_names([line.decode() for line in lines]))
    except (InputError, OSError, UnicodeDecodeError) as error:
        reason = str(error).removeprefix(f"{path}: ").rstrip(".")
        raise ConfigError(
            f"{path} cannot be read ({reason}); give a file of names, one a line."
        ) from None
    if not any(map(len, chunks)):
        raise ConfigError(f"{path} holds no names; write one cluster a line, or leave it out.")
    return pa.chunked_array(chunks)


def _names(lines: list[str]) -> pa.Array:
    names = pc.utf8_trim_whitespace(pa.array(lines, pa.string()))
    for header in (FASTA_HEADER, UNIREF_HEADER):
        names = pc.replace_substring_regex(names, header, r"\1")
    return names.filter(pc.not_equal(names, ""))


class Listed:
    """Listed names and their `records.listed_hashes`."""

    def __init__(self, names: Sequence[str] | pa.ChunkedArray) -> None:
        if not isinstance(names, pa.ChunkedArray):
            names = pa.chunked_array([pa.array(names, pa.string())])
        self._names = names
        found = [listed_hashes(chunk.to_pylist()) for chunk in names.chunks]
        self._hashes = np.concatenate([np.zeros(0, np.uint64), *found])
        self.hashes = np.unique(self._hashes)
        """Sorted, [n] uint64."""

    def missing(self, found: np.ndarray, most: int) -> tuple[int, list[str]]:
        """How many names are not among the found hashes, and the first `most` of them."""
        places = np.flatnonzero(~is_listed(self._hashes, np.unique(found)))
        count = len(np.unique(self._hashes[places]))
        return count, self._names.take(pa.array(places[:most])).to_pylist()
