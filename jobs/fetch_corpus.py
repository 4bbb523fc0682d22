"""Fetch proteins from UniProt's public downloads, ready for build_corpus.py.

    python jobs/fetch_corpus.py demo
    python jobs/fetch_corpus.py uniref50 --output /shared/uniprot --unpack
    python jobs/fetch_corpus.py uniref50-members --output /shared/uniprot

Sources (the size is about that of a release of 2025):

    demo              Escherichia coli K-12, 4,400 proteins, 1 MB
    swissprot         the reviewed part of UniProtKB, 570 thousand proteins, 90 MB
    uniref50          one protein for each UniRef50 cluster, 70 million, 13 GB
    uniref100         all proteins without exact copies, 450 million, 100 GB
    uniref50-members  which UniRef100 entry is in which UniRef50 cluster, as a table for
                      build_corpus.py --clusters, 13 GB; entries of UniParc alone are not in it and
                      keep a cluster of their own

A download that breaks off goes on by itself, and when the same command is given again. Size and
MD5 are those of UniProt's RELEASE.metalink; a file appears under its name only when they are right.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
from isal import igzip
from tqdm import tqdm

from commandline import job_parser, refuse_output, run_job
from raptide.data.building.fetch import fetch, find_file
from raptide.data.compressed import open_plain
from raptide.errors import FetchError, InputError

MIRROR = "https://ftp.uniprot.org/pub/databases/uniprot"
"""UniProt's own server; EBI and SIB mirror it."""

KNOWLEDGEBASE = "current_release/knowledgebase"
IDMAPPING_COLUMNS = 22
UNIREF100, UNIREF50 = "7", "9"
"""Columns of idmapping_selected.tab, from 0 (README beside it)."""

READ_BYTES = 16 << 20


class Source(NamedTuple):
    """Where a source lies on the server."""

    path: str
    is_table: bool = False


SOURCES = {
    "demo": Source(
        f"{KNOWLEDGEBASE}/reference_proteomes/Bacteria/UP000000625/UP000000625_83333.fasta.gz"
    ),
    "swissprot": Source(f"{KNOWLEDGEBASE}/complete/uniprot_sprot.fasta.gz"),
    "uniref50": Source("uniref/uniref50/uniref50.fasta.gz"),
    "uniref100": Source("uniref/uniref100/uniref100.fasta.gz"),
    "uniref50-members": Source(f"{KNOWLEDGEBASE}/idmapping/idmapping_selected.tab.gz", True),
}


def main() -> None:
    parser = job_parser(__doc__)
    parser.add_argument("source", choices=SOURCES)
    parser.add_argument("--output", type=Path, default=Path("downloads"), metavar="DIR")
    parser.add_argument("--mirror", default=MIRROR, metavar="URL", help="default: %(default)s")
    parser.add_argument(
        "--unpack",
        action="store_true",
        help="leave a plain FASTA file beside, which all cores can read at once",
    )
    args = parser.parse_args()
    refuse_output(args.output, "--output")
    source = SOURCES[args.source]
    remote = find_file(f"{args.mirror.rstrip('/')}/{source.path}")
    file = fetch(remote, args.output)
    if source.is_table:
        file = write_members(file, args.output / "uniref50_members.tsv.gz")
    elif args.unpack:
        file = unpack(file)
    print(f"{file}: {file.stat().st_size:,} bytes, UniProt release {remote.release}")
    made = shlex.quote(str(file))
    if source.is_table:
        print(f"Next: python jobs/build_corpus.py --input uniref100.fasta --clusters {made} ...")
    else:
        print(f"Next: python jobs/build_corpus.py --input {made} --output corpora/{args.source}")


def unpack(file: Path) -> Path:
    """Decompress a file beside itself."""
    plain = file.with_suffix("")
    with (
        _whole_or_nothing(plain) as part,
        open_plain(file) as packed,
        part.open("wb") as output,
        tqdm(unit="B", unit_scale=True, desc=plain.name) as bar,
    ):
        while chunk := packed.read(READ_BYTES):
            output.write(chunk)
            bar.update(len(chunk))
    return plain


def write_members(idmapping: Path, table: Path) -> Path:
    """`UniRef50 cluster, tab, UniRef100 entry` for each entry of idmapping_selected.tab."""
    names = [str(number) for number in range(IDMAPPING_COLUMNS)]
    with (
        _whole_or_nothing(table) as part,
        open_plain(idmapping) as packed,
        igzip.open(part, "wb") as output,
        tqdm(unit=" entries", desc=table.name) as bar,
    ):
        reader = pyarrow.csv.open_csv(
            packed,
            pyarrow.csv.ReadOptions(column_names=names, block_size=READ_BYTES),
            pyarrow.csv.ParseOptions(delimiter="\t", quote_char=False),
            pyarrow.csv.ConvertOptions(
                include_columns=[UNIREF50, UNIREF100],
                column_types=dict.fromkeys([UNIREF50, UNIREF100], pa.string()),
                strings_can_be_null=False,
            ),
        )
        for batch in reader:
            bar.update(batch.num_rows)
            output.write(_member_lines(pa.Table.from_batches([batch])))
    return table


def _member_lines(entries: pa.Table) -> bytes:
    clustered = pc.and_(pc.not_equal(entries[UNIREF50], ""), pc.not_equal(entries[UNIREF100], ""))
    # Several UniProtKB entries of one sequence share one UniRef100 entry.
    pairs = entries.filter(clustered).group_by([UNIREF50, UNIREF100]).aggregate([])
    lines = pa.BufferOutputStream()
    pyarrow.csv.write_csv(
        pairs.select([UNIREF50, UNIREF100]),
        lines,
        pyarrow.csv.WriteOptions(include_header=False, delimiter="\t", quoting_style="none"),
    )
    return lines.getvalue().to_pybytes()


@contextmanager
def _whole_or_nothing(file: Path) -> Iterator[Path]:
    """A path to write to, which takes the file's place when the block ends well."""
    part = file.with_name(file.name + ".part")
    try:
        yield part
    except (InputError, OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        raise FetchError(f"{file} cannot be written ({error}); fetch again.") from None
    else:
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


if __name__ == "__main__":
    run_job(main)
