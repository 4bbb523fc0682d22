"""Download one file so that it is whole or not there: resumed where it broke off, checked by hash.

UniProt lists the size and MD5 of every file of a folder in RELEASE.metalink beside it. Other
servers give no more than a size and a tag of the version.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from dataclasses import dataclass
from fnmatch import fnmatchcase
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
    """A file as its release, or its server, describes it."""

    url: str
    size: int
    """Bytes."""

    md5: str | None
    """None where nobody publishes it."""

    release: str
    """E.g. 2026_04, or what tells one version from another."""

    @property
    def part_name(self) -> str:
        """What is not whole yet has a name of its version, never gone on with for another."""
        version = self.md5 or hashlib.blake2b(f"{self.release} {self.size}".encode()).hexdigest()
        return f"{self.url.rpartition('/')[2]}.{version[:8]}.part"


def find_file(url: str) -> RemoteFile:
    """Look a file up in the metalink of its folder.

    Raises:
        FetchError: the metalink cannot be read, or does not list the file.
    """
    folder, _, name = url.rpartition("/")
    return find_files(folder, name)[0]


def find_files(folder: str, pattern: str) -> list[RemoteFile]:
    """The files of a folder whose names match a pattern like `*.gz`, as its metalink lists them.

    Raises:
        FetchError: the metalink cannot be read, or lists no such file.
    """
    metalink = f"{folder}/{METALINK}"
    try:
        answer = httpx.get(metalink, timeout=TIMEOUT_S, follow_redirects=True)
        answer.raise_for_status()
        tree = ElementTree.fromstring(answer.content)
        for element in tree.iter():
            element.tag = element.tag.rpartition("}")[2]  # without the namespace
        release = tree.findtext("version", "unknown")
        found = [
            RemoteFile(
                f"{folder}/{name}",
                int(file.findtext("size", "")),
                file.findtext(".//hash[@type='md5']", "").strip().lower(),
                release,
            )
            for file in tree.iter("file")
            if fnmatchcase(name := file.get("name", ""), pattern)
        ]
    except httpx.HTTPError as error:
        raise FetchError(f"{metalink} cannot be read ({error}); try again later.") from None
    except (ElementTree.ParseError, ValueError):
        found = []
    if not found:
        raise FetchError(
            f"{metalink} does not give size and MD5 of {pattern}; choose another --mirror."
        )
    return found


def ask_file(url: str) -> RemoteFile:
    """What the server itself says of a file: its size, and its version by ETag.

    Raises:
        FetchError: the server does not answer, or gives no size.
    """
    try:
        answer = httpx.head(
            url,
            headers={"Accept-Encoding": "identity"},
            timeout=TIMEOUT_S,
            follow_redirects=True,
        )
        answer.raise_for_status()
        size = int(answer.headers["Content-Length"])
    except httpx.HTTPError as error:
        raise FetchError(f"{url} cannot be fetched ({error}); try again later.") from None
    except (KeyError, ValueError):
        raise FetchError(f"{url} comes without its size; choose another --mirror.") from None
    return RemoteFile(url, size, None, answer.headers.get("ETag", "unknown"))


def fetch(remote: RemoteFile, folder: Path) -> Path:
    """Download a file into a folder, or find it there; draws a progress bar.

    Without an MD5 only the size is compared; what the file holds is for the caller to check.

    Raises:
        FetchError: the disk is too small, the server gives up, or the hash is wrong.
    """
    file = folder / remote.url.rpartition("/")[2]
    part = folder / remote.part_name
    if _size(file) == remote.size and remote.md5 in (None, _md5(file)):
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
    if remote.md5 not in (None, found := _md5(part)):
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
