"""Download one file so that it is whole or not there: resumed where it broke off, checked by hash.

UniProt lists the size and MD5 of every file of a folder in RELEASE.metalink beside it.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import httpx
from tqdm import tqdm

from raptide.errors import FetchError

METALINK = "RELEASE.metalink"
TIMEOUT_S = 60.0

ATTEMPTS = 8
"""Attempts in a row that bring not one byte, before the download is given up."""

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
"""Seconds before the next attempt; each pause is twice the one before."""


@dataclass(frozen=True)
class RemoteFile:
    """A file as its release describes it."""

    url: str
    size: int
    """Bytes."""

    md5: str
    release: str
    """E.g. 2026_04."""


def find_file(url: str) -> RemoteFile:
    """Look a file up in the metalink of its folder.

    Raises:
        FetchError: the metalink cannot be read, or does not list the file.
    """
    folder, _, name = url.rpartition("/")
    metalink = f"{folder}/{METALINK}"
    try:
        answer = httpx.get(metalink, timeout=TIMEOUT_S, follow_redirects=True)
        answer.raise_for_status()
        tree = ElementTree.fromstring(answer.content)
        for element in tree.iter():
            element.tag = element.tag.rpartition("}")[2]  # without the namespace
        found = next(file for file in tree.iter("file") if file.get("name") == name)
        size, md5 = found.findtext("size", ""), found.findtext(".//hash[@type='md5']", "")
        return RemoteFile(url, int(size), md5.strip().lower(), tree.findtext("version", "unknown"))
    except httpx.HTTPError as error:
        raise FetchError(f"{metalink} cannot be read ({error}); try again later.") from None
    except (ElementTree.ParseError, StopIteration, ValueError):
        raise FetchError(
            f"{metalink} does not give size and MD5 of {name}; choose another --mirror."
        ) from None


def fetch(remote: RemoteFile, folder: Path) -> Path:
    """Download a file into a folder, or find it there; draws a progress bar.

    What is not whole yet has a name with the hash in it, so that it is never gone on with for
    another release.

    Raises:
        FetchError: the disk is too small, the server gives up, or the hash is wrong.
    """
    file = folder / remote.url.rpartition("/")[2]
    part = folder / f"{file.name}.{remote.md5[:8]}.part"
    if file.exists() and file.stat().st_size == remote.size and _md5(file) == remote.md5:
        return file
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"{file.name}.*.part"):
        if old != part:
            old.unlink()
    _refuse_small_disk(folder, remote.size - _size(part))
    with tqdm(
        total=remote.size, unit="B", unit_scale=True, unit_divisor=1024, desc=file.name
    ) as bar:
        _download(remote, part, bar)
    found = _md5(part)
    if found != remote.md5:
        part.unlink()
        raise FetchError(
            f"{remote.url} arrived damaged: expected MD5 {remote.md5}, found {found}; "
            "fetch it again."
        )
    part.replace(file)
    return file


def _download(remote: RemoteFile, part: Path, bar: tqdm) -> None:
    """Fill the partial file up; breaks in the connection cost no byte that has arrived."""
    failures = 0
    pause = FIRST_PAUSE_S
    while (held := _size(part)) < remote.size:
        try:
            _receive(remote, part, bar)
        except httpx.HTTPError as error:
            reason = str(error) or type(error).__name__
        else:
            reason = "the connection ended early"
        if _size(part) > held:
            failures, pause = 0, FIRST_PAUSE_S
            continue
        failures += 1
        if failures == ATTEMPTS:
            raise FetchError(
                f"{remote.url} cannot be fetched ({reason}, {ATTEMPTS} times in a row); the same "
                f"command goes on after {_size(part):,} of {remote.size:,} bytes."
            )
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_S)


def _receive(remote: RemoteFile, part: Path, bar: tqdm) -> None:
    """Append what one connection brings; anew where the server knows no ranges."""
    held = _size(part)
    headers = {"Range": f"bytes={held}-", "Accept-Encoding": "identity"}
    with httpx.stream(
        "GET", remote.url, headers=headers, timeout=TIMEOUT_S, follow_redirects=True
    ) as answer:
        answer.raise_for_status()
        goes_on = answer.status_code == httpx.codes.PARTIAL_CONTENT
        with part.open("ab" if goes_on else "wb") as file:
            bar.update(file.tell() - bar.n)
            for chunk in answer.iter_raw():
                file.write(chunk)
                bar.update(len(chunk))


def _refuse_small_disk(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise FetchError(
            f"{folder} has {free / 1e9:.1f} GB free, but {needed / 1e9:.1f} GB are still to come; "
            "choose another --output."
        )


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _md5(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
