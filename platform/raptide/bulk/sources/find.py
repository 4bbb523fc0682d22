"""What people name as input: files, folders, globs, URIs, pipes and corpora."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from pyarrow.fs import FileInfo, FileSelector, FileType

from raptide.bulk.sources.corpus import CorpusSplit, Members
from raptide.bulk.sources.fasta import FastaFile
from raptide.bulk.sources.mutants import Proteins
from raptide.bulk.sources.pipe import Pipe
from raptide.bulk.sources.tables import ParquetFile, is_parquet
from raptide.bulk.sources.variants import VariantTable, open_table
from raptide.bulk.units import Source
from raptide.data.corpus import BLOCK_TABLE, MANIFEST, Split
from raptide.data.fasta import ReadingRules
from raptide.data.fasta_text import is_stream
from raptide.errors import ConfigError
from raptide.patience import read_surely
from raptide.storage import Storage, is_uri, storage_of

KNOWN = re.compile(
    r"\.(?:fasta|fas|fa|faa|fsa|pep|parquet)(?:\.(?:gz|bgz|bz2|xz|zst))?$", re.IGNORECASE
)
"""Names of the files that are taken out of a folder."""

KINDS = "FASTA or Parquet (.fasta, .fa, .faa, .parquet, ...)"

KNOWN_TABLES = re.compile(r"\.(?:csv|tsv|parquet)(?:\.(?:gz|bgz|bz2|xz|zst))?$", re.IGNORECASE)
TABLE_KINDS = "tables (.csv, .tsv, .csv.gz, .parquet, ...)"

LENIENT = ReadingRules(stop_codons="drop", bad_letters="drop", nucleotides="drop", bare="drop")
"""No record stops a job."""


def find_sources(
    inputs: Iterable[str | Path],
    rules: ReadingRules = LENIENT,
    split: Split = "train",
    sampling: Members = "representatives",
) -> list[Source]:
    """The sources that some paths, folders, globs and URIs stand for, in order.

    Args:
        rules: what becomes of a FASTA file's records that are no proteins.
        split: of corpora.
        sampling: of corpora.

    Raises:
        ConfigError: one is not there, or a folder holds nothing that is known.
    """
    found: list[Source] = []
    for each in map(str, inputs):
        if is_stream(each):
            found.append(Pipe(each, rules))
            continue
        if not is_uri(each) and (Path(each) / MANIFEST).is_file():
            refuse_other_folders(Path(each))
            found.append(CorpusSplit(Path(each).resolve(), split, sampling))
            continue
        found += [_open(storage, file, rules) for storage, file in find_files(each)]
    if not found:
        raise ConfigError("There is no input; name FASTA or Parquet files, folders, or a corpus.")
    return found


def find_tables(
    inputs: Iterable[str | Path],
    columns: Sequence[str],
    offset: int = 0,
    proteins: Iterable[str | Path] | None = None,
) -> list[VariantTable]:
    """The tables of variants that some paths, folders, globs and URIs stand for, in order.

    Args:
        columns: names that will be added.
        offset: number of the position before a protein's first.
        proteins: FASTA files, or tables, of the proteins that the column `id` names.

    Raises:
        ConfigError: one is not there, or is no such table, or two have one name.
    """
    given, named = list(map(str, inputs)), list(map(str, proteins or ()))
    for each in filter(is_stream, given + named):
        raise ConfigError(
            f"{each} can be read only once, but tables of variants and their proteins are read "
            "again when a job goes on; write it to a file first."
        )
    lookup = Proteins(tuple(find_sources(named))) if named else None
    found: dict[str, VariantTable] = {}
    for each in given:
        for storage, file in find_files(each, KNOWN_TABLES, TABLE_KINDS):
            table = open_table(storage, file, offset, lookup)
            _refuse_columns(table, columns)
            if table.file in found:
                raise ConfigError(
                    f"--input names {found[table.file].name} and {table.name}, but scored tables "
                    "have the names of their inputs; rename one, or give the folder of both."
                )
            found[table.file] = table
    return list(found.values())


def _refuse_columns(table: VariantTable, more: Sequence[str]) -> None:
    """Raises ConfigError where a column's name would stand there twice."""
    names = [*table.columns, *more]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        why = "which is to be added" if twice in more else "twice"
        raise ConfigError(f"{table.name} has a column {twice!r}, {why}; rename or delete it.")


def refuse_other_folders(folder: Path) -> None:
    if not (folder / BLOCK_TABLE).is_file():
        raise ConfigError(
            f"--input {folder} is neither a corpus (no {BLOCK_TABLE}) nor a folder of FASTA files; "
            "name its files."
        )


def find_files(
    given: str, known: re.Pattern[str] = KNOWN, kinds: str = KINDS
) -> Iterator[tuple[Storage, str]]:
    """The files that one path, folder, glob or URI stands for.

    Args:
        known: names that are taken out of a folder.
        kinds: the same in words, for the error.

    Raises:
        ConfigError: there are none.
    """
    if not is_uri(given) and not os.path.exists(given):
        paths = sorted(glob.glob(given, recursive=True)) if re.search(r"[*?\[]", given) else []
        if not paths:
            raise _missing(given)
        for path in paths:
            yield from find_files(path, known, kinds)
        return
    storage = storage_of(given, "--input")
    info = read_surely(given, lambda: storage.filesystem.get_file_info(storage.path))
    if info.is_file:
        yield Storage(storage.filesystem, os.path.dirname(storage.path)), info.base_name
        return
    if info.type == FileType.NotFound:
        yield from _match(given, storage)
        return
    files = _known_files(_below(given, storage), known)
    if not files:
        raise ConfigError(
            f"--input {given} holds no files that are named like {kinds}; name the files "
            "themselves."
        )
    for file in files:
        yield storage, os.path.relpath(file, storage.path)


def _match(given: str, storage: Storage) -> Iterator[tuple[Storage, str]]:
    """The files that a glob behind a URI stands for; here `?` begins the options instead."""
    folder, pattern = storage.path, ""
    while "*" in folder:
        folder, _, last = folder.rpartition("/")
        pattern = f"{last}/{pattern}" if pattern else last
    base = Storage(storage.filesystem, folder)
    levels = [re.escape(level).replace(r"\*", "[^/]*") for level in pattern.split("/")]
    wanted = re.compile("/".join(levels).replace("[^/]*[^/]*/", "(?:.*/)?"))
    found = (
        [os.path.relpath(each.path, folder) for each in _below(given, base) if each.is_file]
        if pattern
        else []
    )
    files = sorted(file for file in found if wanted.fullmatch(file))
    if not files:
        raise _missing(given)
    for file in files:
        yield base, file


def _below(given: str, storage: Storage) -> list[FileInfo]:
    selector = FileSelector(storage.path, allow_not_found=True, recursive=True)
    return read_surely(given, lambda: storage.filesystem.get_file_info(selector))


def _known_files(infos: list[FileInfo], known: re.Pattern[str]) -> list[str]:
    """Paths of the files that are taken out of a folder; none of corpora and of jobs' output."""
    inside = tuple(f"{os.path.dirname(i.path)}/" for i in infos if i.base_name == MANIFEST)
    files = (i.path for i in infos if i.is_file and known.search(i.base_name))
    return sorted(path for path in files if not path.startswith(inside))


def _missing(given: str) -> ConfigError:
    return ConfigError(f"--input {given} is not there; name existing files or folders.")


def _open(storage: Storage, file: str, rules: ReadingRules) -> Source:
    is_table = is_parquet(storage, file)
    return ParquetFile(storage, file) if is_table else FastaFile(storage, file, rules)
