"""Fetch proteins from UniProt's public downloads, ready for build_corpus.py.

    python jobs/fetch_corpus.py demo
    python jobs/fetch_corpus.py uniref100 --output /shared/uniprot --unpack
    python jobs/fetch_corpus.py uniref50-members --output /shared/uniprot
    python jobs/fetch_corpus.py heldout-ur50 --output /shared/uniprot

Each prints the build_corpus.py command that comes next. Sources:

    demo                Escherichia coli K-12, 4,400 proteins, 1 MB
    swissprot           the reviewed part of UniProtKB, 570 thousand proteins, 90 MB
    uniref50            one protein for each UniRef50 cluster
    uniref90            one protein for each UniRef90 cluster, as ESM-2 draws from
    uniref100           all proteins without exact copies, 450 million, 100 GB: the paper's UR100,
                        UR50/S and UR50/D are made of it
    uniref50-members    which UniRef100 entry is in which UniRef50 cluster, also those of UniParc
                        alone: UniRef50's XML as a table for build_corpus.py --clusters
    uniref50-members90  the same for the entries of UniRef90
    uniparc             all proteins ever, in 200 files: the paper's largest set, of which it held
                        1 million of 250 million out
    heldout-ur50        the UniRef50 clusters that the paper's authors held out (3.016 million names
                        of UniRef 2018_03), for build_corpus.py --holdout-clusters
    heldout-ur100       the same clusters' UniRef100 entries (13.745 million)

A download that breaks off goes on by itself, and when the same command is given again. Size and
MD5 are those of UniProt's RELEASE.metalink; a file appears under its name only when they are right.
The authors' lists have no published MD5: they are read to their end instead.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from isal import igzip
from tqdm import tqdm

from commandline import as_called, job_parser, refuse_output, run_job
from raptide.data.building.fetch import RemoteFile, ask_file, fetch, find_files
from raptide.data.building.heldout import read_list
from raptide.data.building.uniref import read_members
from raptide.data.compressed import open_plain
from raptide.errors import ConfigError, FetchError, InputError

UNIPROT = "https://ftp.uniprot.org/pub/databases/uniprot"
"""UniProt's own server; EBI and SIB mirror it."""

FAIR_ESM = "https://dl.fbaipublicfiles.com/fair-esm/pretraining-data"

KNOWLEDGEBASE = "current_release/knowledgebase"

READ_BYTES = 16 << 20


class Source(NamedTuple):
    """Where a source lies on its server, and what is built of it."""

    path: str
    """A file, or a pattern for several."""

    build: str
    """What build_corpus.py is given as --input and after; {files} are this source's."""

    server: str = UNIPROT
    members: str = ""
    """Which members the table made of an XML file names."""


SOURCES = {
    "demo": Source(
        f"{KNOWLEDGEBASE}/reference_proteomes/Bacteria/UP000000625/UP000000625_83333.fasta.gz",
        "{files} --output corpora/demo",
    ),
    "swissprot": Source(
        f"{KNOWLEDGEBASE}/complete/uniprot_sprot.fasta.gz", "{files} --output corpora/swissprot"
    ),
    "uniref50": Source("uniref/uniref50/uniref50.fasta.gz", "{files} --output corpora/uniref50"),
    "uniref90": Source(
        "uniref/uniref90/uniref90.fasta.gz",
        "{files} --clusters {folder}/uniref50_members90.tsv.gz --unclustered drop "
        "--output corpora/ur90",
    ),
    "uniref100": Source(
        "uniref/uniref100/uniref100.fasta.gz",
        "{files} --clusters {folder}/uniref50_members.tsv.gz --unclustered drop "
        "--output corpora/ur100",
    ),
    "uniref50-members": Source(
        "uniref/uniref50/uniref50.xml.gz",
        "{folder}/uniref100.fasta --clusters {files} --unclustered drop --output corpora/ur100",
        members="UniRef100",
    ),
    "uniref50-members90": Source(
        "uniref/uniref50/uniref50.xml.gz",
        "{folder}/uniref90.fasta --clusters {files} --unclustered drop --output corpora/ur90",
        members="UniRef90",
    ),
    "uniparc": Source(
        "current_release/uniparc/fasta/active/uniparc_active_p*.fasta.gz",
        "{files} --holdout-fraction 0.004 --output corpora/uniparc",
    ),
    "heldout-ur50": Source(
        "uniref201803_ur50_valid_headers.txt.gz",
        "{folder}/uniref100.fasta --clusters {folder}/uniref50_members.tsv.gz --unclustered drop "
        "--holdout-fraction 0 --holdout-clusters {files} --output corpora/ur100",
        server=FAIR_ESM,
    ),
    "heldout-ur100": Source(
        "uniref201803_ur100_valid_headers.txt.gz",
        "{folder}/uniref100.fasta --clusters {folder}/uniref50_members.tsv.gz --unclustered drop "
        "--holdout-fraction 0 --holdout-clusters {files} --output corpora/ur100",
        server=FAIR_ESM,
    ),
}


def main() -> None:
    parser = job_parser(__doc__)
    parser.add_argument("source", choices=SOURCES, help="as above")
    group = parser.add_argument_group("where from, and to")
    group.add_argument(
        "--output", type=Path, default=Path("downloads"), metavar="DIR", help="folder of the files"
    )
    group.add_argument("--mirror", metavar="URL", help=f"default: {UNIPROT}, or {FAIR_ESM}")
    group.add_argument(
        "--unpack",
        action="store_true",
        help="leave a plain FASTA file beside, which all cores can read at once",
    )
    args = parser.parse_args()
    refuse_output(args.output, "--output")
    source = SOURCES[args.source]
    server = (args.mirror or source.server).rstrip("/")
    for remote in _find(source, server):
        file = prepare(fetch(remote, args.output), source, args.unpack)
        release = f", UniProt release {remote.release}" if remote.md5 else ""
        print(f"{file}: {file.stat().st_size:,} bytes{release}")
    folder = shlex.quote(str(args.output))
    pattern = Path(source.path).name.removesuffix(".gz" if args.unpack else "")
    files = f"{folder}/{pattern}" if "*" in source.path else shlex.quote(str(file))
    what = source.build.format(files=files, folder=folder)
    print(as_called(f"Next: python jobs/build_corpus.py --input {what}"))


def _find(source: Source, server: str) -> list[RemoteFile]:
    """The source's files; those of UniProt with their hashes."""
    if source.server == FAIR_ESM:
        return [ask_file(f"{server}/{source.path}")]
    folder, _, pattern = source.path.rpartition("/")
    return find_files(f"{server}/{folder}", pattern)


def prepare(file: Path, source: Source, plain: bool) -> Path:
    """Make of a download what build_corpus.py reads."""
    if source.members:
        ending = source.members.removeprefix("UniRef").replace("100", "")
        table = file.with_name(f"uniref50_members{ending}.tsv.gz")
        return write_members(file, table, source.members)
    if source.server == FAIR_ESM:
        print(f"{count_names(file):,} names")
        return file
    return unpack(file) if plain else file


def count_names(file: Path) -> int:
    """Read a list to its end, as its checksum is in there alone."""
    try:
        return len(read_list(file))
    except ConfigError as error:
        file.unlink()
        raise FetchError(f"What arrived is no list of names: {error}") from None


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


def write_members(xml: Path, table: Path, kind: str) -> Path:
    """`UniRef50 cluster, tab, member` for each member of one kind that UniRef50's XML names."""
    with (
        _whole_or_nothing(table) as part,
        open_plain(xml) as packed,
        igzip.open(part, "wb") as output,
        tqdm(unit=" members", unit_scale=True, desc=table.name) as bar,
    ):
        for lines in read_members(packed, kind):
            output.write("".join(lines).encode())
            bar.update(len(lines))
    return table


@contextmanager
def _whole_or_nothing(file: Path) -> Iterator[Path]:
    """A path to write to, which takes the file's place when the block ends well."""
    part = file.with_name(file.name + ".part")
    try:
        yield part
    except (InputError, OSError) as error:
        raise FetchError(f"{file} cannot be written ({error}); fetch again.") from None
    else:
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


if __name__ == "__main__":
    run_job(main)
