"""What people name as input: files, folders, globs, URIs, pipes and corpora."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from pyarrow.fs import FileInfo, FileSelector, FileType

from raptide.bulk.sources.corpus import CorpusSplit, Members
from raptide.bulk.sources.fasta import FastaFile
from raptide.bulk.sources.pipe import Pipe
from raptide.bulk.sources.tables import ParquetFile
from raptide.bulk.units import Source
from raptide.data.corpus import BLOCK_TABLE, MANIFEST, Split
from raptide.data.fasta import ReadingRules
from raptide.data.fasta_text import is_stream
from raptide.errors import ConfigError
from raptide.storage import Storage, is_uri, patiently, read_surely, storage_of

KNOWN = re.compile(
    r"\.(?:fasta|fas|fa|faa|fsa|pep|parquet)(?:\.(?:gz|bgz|bz2|xz|zst))?$", re.IGNORECASE
)
"""Names of the files that are taken out of a folder."""

PARQUET = b"PAR1"

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


def refuse_other_folders(folder: Path) -> None:
    if not (folder / BLOCK_TABLE).is_file():
        raise ConfigError(
            f"--input {folder} is neither a corpus (no {BLOCK_TABLE}) nor a folder of FASTA files; "
            "name its files."
        )


def find_files(given: str) -> Iterator[tuple[Storage, str]]:
    """The files that one path, folder, glob or URI stands for.

    Raises:
        ConfigError: there are none.
    """
    if not is_uri(given) and not os.path.exists(given):
        paths = sorted(glob.glob(given, recursive=True)) if re.search(r"[*?\[]", given) else []
        if not paths:
            raise _missing(given)
        for path in paths:
            yield from find_files(path)
        return
    storage = storage_of(given, "--input")
    info = read_surely(given, lambda: storage.filesystem.get_file_info(storage.path))
    if info.is_file:
        yield Storage(storage.filesystem, os.path.dirname(storage.path)), info.base_name
        return
    if info.type == FileType.NotFound:
        yield from _match(given, storage)
        return
    files = _proteins(_below(given, storage))
    if not files:
        raise ConfigError(
            f"--input {given} holds no files that are named like FASTA or Parquet (.fasta, .fa, "
            ".faa, .parquet, ...); name the files themselves."
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


def _proteins(infos: list[FileInfo]) -> list[str]:
    """Paths of the files that are taken out of a folder; none of corpora and of jobs' output."""
    inside = tuple(f"{os.path.dirname(i.path)}/" for i in infos if i.base_name == MANIFEST)
    known = (i.path for i in infos if i.is_file and KNOWN.search(i.base_name))
    return sorted(path for path in known if not path.startswith(inside))


def _missing(given: str) -> ConfigError:
    return ConfigError(f"--input {given} is not there; name existing files or folders.")


def _open(storage: Storage, file: str, rules: ReadingRules) -> Source:
    path = storage.full(file)

    def is_parquet() -> bool:
        with storage.filesystem.open_input_file(path) as opened:
            return opened.read(len(PARQUET)) == PARQUET

    try:
        is_table = patiently(is_parquet)
    except OSError as error:
        raise ConfigError(
            f"--input {path} cannot be read ({error.strerror or error}); change its permissions, "
            "or leave it out."
        ) from None
    return ParquetFile(storage, file) if is_table else FastaFile(storage, file, rules)
