"""Cluster membership from tables in MMseqs2's form: representative, tab, member; one line each.

A line becomes a row of the shape that records' names have, so that Ray Data can bring it to the
record it speaks of by a shuffle on the hash of the name: no process holds all names.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from raptide.data.building.records import name_hashes, plain_names
from raptide.data.compressed import open_plain
from raptide.errors import CorpusError, InputError
from raptide.patience import is_final, unreadable

NO_RECORD = -1
"""What stands in the column `number` of a line."""

READ_BYTES = 8 << 20

COLUMNS = ("cluster", "id")


def read_membership(path: str | Path) -> Iterator[pa.Table]:
    """The lines of one file (plain or compressed), as `records.named_table` gives the records.

    Raises:
        CorpusError: the file cannot be read, or a line has other than two columns.
        StorageStumbled: the file system fails again and again.
    """
    try:
        with open_plain(path) as file:
            reader = pyarrow.csv.open_csv(
                file,
                pyarrow.csv.ReadOptions(column_names=COLUMNS, block_size=READ_BYTES),
                pyarrow.csv.ParseOptions(delimiter="\t", quote_char=False),
                pyarrow.csv.ConvertOptions(
                    column_types=dict.fromkeys(COLUMNS, pa.string()), strings_can_be_null=False
                ),
            )
            for batch in reader:
                yield _named(pa.Table.from_batches([batch]), path)
    except CorpusError:
        raise
    except (InputError, OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        if isinstance(error, OSError) and not is_final(error):
            raise unreadable(str(path), error) from None
        reason = str(error).split("\n")[0].removeprefix(f"{path}: ").rstrip(".")
        raise CorpusError(
            f"{path} is no cluster table ({reason}); a line holds the representative's name, a "
            "tab and the member's name."
        ) from None


def _named(lines: pa.Table, path: str | Path) -> pa.Table:
    for column, other in zip(COLUMNS, reversed(COLUMNS), strict=True):
        blank = pc.equal(pc.utf8_trim_whitespace(lines[column]), "")
        if pc.any(blank).as_py():
            what = {"cluster": "representative", "id": "member"}
            beside = lines[other].filter(blank)[0].as_py()
            raise CorpusError(
                f"{path}: the line of the {what[other]} {beside!r} names no {what[column]}; a line "
                "holds the representative's name, a tab and the member's name."
            )
    keys = plain_names(lines["id"].combine_chunks())
    return pa.table(
        {
            "number": np.full(len(keys), NO_RECORD),
            "name_hash": name_hashes(keys),
            "id": keys,
            "cluster": lines["cluster"],
        }
    )


def join_membership(table: pa.Table, strict: bool) -> pa.Table:
    """The cluster that its line gives to each record, as notes: columns number and cluster.

    Args:
        table: all records and all lines of some names.
        strict: whether every member must be a record.

    Raises:
        CorpusError: a line names a member that no record has, or a member has two clusters.
    """
    is_line = pc.equal(table["number"], NO_RECORD)
    lines, records = table.filter(is_line), table.filter(pc.invert(is_line))
    lines = lines.select(COLUMNS).group_by(list(COLUMNS)).aggregate([]).sort_by("id")
    names = lines["id"].combine_chunks()
    _refuse_two_clusters(lines)
    unknown = pc.invert(pc.is_in(names, value_set=records["id"].combine_chunks()))
    if strict and pc.any(unknown).as_py():
        raise CorpusError(
            f"The cluster table names the member {names.filter(unknown)[0].as_py()!r}, which no "
            "record of the input is called; give the table that belongs to these files, or say "
            "--clusters-of-a-larger-set."
        )
    place = pc.index_in(records["id"], value_set=names)
    clusters = pc.take(lines["cluster"], place)
    return pa.table({"number": records["number"], "cluster": clusters}).filter(
        pc.is_valid(clusters)
    )


def _refuse_two_clusters(lines: pa.Table) -> None:
    names = lines["id"].to_numpy(zero_copy_only=False)
    twice = np.flatnonzero(names[1:] == names[:-1])
    if len(twice):
        first, second = lines["cluster"].slice(twice[0], 2).to_pylist()
        raise CorpusError(
            f"The cluster table puts the member {names[twice[0]]!r} into two clusters, {first!r} "
            f"and {second!r}; each member belongs to one."
        )
