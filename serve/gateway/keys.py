"""API keys: who may ask, and how much. `python -m serve.keys NAME` makes one.

The endpoint knows only hashes, one key a line, in a file or in the variable RAPTIDE_API_KEYS:

    # name       sha256 of the key                  residues per minute (optional)
    team-a       sha256:9f86d081884c7d659a2f...     2000000
    notebook     sha256:60303ae22b998861bce3...

To revoke a key, delete its line: gateways read the file again when it has changed, within a second,
and believe that a key is gone once it has been gone for two more.
Keys are 256 random bits, so one round of SHA-256 is enough to keep them.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import threading
import time
import weakref
from dataclasses import dataclass
from pathlib import Path

from raptide.errors import ConfigError
from serve.gateway.refusals import Refusal

ENVIRONMENT = "RAPTIDE_API_KEYS"
NAME = re.compile(r"[A-Za-z0-9._-]+")
LINE = re.compile(rf"({NAME.pattern})\s+sha256:([0-9a-f]{{64}})(?:\s+([1-9][0-9]*))?")
LOOK_AGAIN_S = 1.0
SETTLE_S = 2.0


@dataclass(frozen=True)
class Key:
    """One named key; the key itself is nowhere."""

    name: str
    digest: bytes
    residues_per_minute: int | None = None


class KeyRing:
    """The keys that are valid now.

    Args:
        file: where they are kept; None means in the environment alone.

    Raises:
        ConfigError: the file cannot be read, or a line is wrong.
    """

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._fixed = parse_keys(os.environ.get(ENVIRONMENT, ""), ENVIRONMENT)
        self._looked = 0.0
        self._seen: object = None
        self._fewer: tuple[object, float] | None = None
        """A file that lacks keys it had, and since when it has been so."""
        self._filed: list[Key] = []
        self._watched = False
        self._read()

    def __bool__(self) -> bool:
        """Whether keys are asked for at all; a file whose last key was revoked still asks."""
        return self._file is not None or bool(self._fixed)

    def watch(self) -> None:
        """From now on look after the file in a thread: a slow file system holds up no request."""
        if self._file is not None:
            self._watched = True
            threading.Thread(target=_watch, args=(weakref.ref(self),), daemon=True).start()

    def find(self, given: str) -> Key | None:
        """The key that a client gave. Takes the same time whichever it is."""
        now = time.monotonic()
        if not self._watched and now - self._looked >= LOOK_AGAIN_S:
            self._looked = now
            self._read()
        digest = hashlib.sha256(given.encode()).digest()
        found = None
        for key in (*self._fixed, *self._filed):
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found

    def check(self, authorization: str) -> Key | None:
        """The key of an `Authorization` header; None where no keys are set.

        Raises:
            Refusal: it holds none that is valid.
        """
        if not self:
            return None
        scheme, _, given = authorization.partition(" ")
        key = self.find(given.strip())
        if scheme.lower() != "bearer" or key is None:
            raise Refusal(
                401,
                "authentication",
                "A valid API key is needed, as the header `Authorization: Bearer KEY`.",
            )
        return key

    def _read(self) -> None:
        """Read the file if it has changed. One that cannot be read or parsed later on changes
        nothing but is retried, and one that lacks keys it had counts once it has stayed so for
        SETTLE_S: a half-written file must not lock everybody out."""
        if self._file is None:
            return
        try:
            status = self._file.stat()
            seen = (status.st_mtime_ns, status.st_size, status.st_ino)
            if seen != self._seen:
                self._take(parse_keys(_text_of(self._file), str(self._file)), seen)
        except OSError as error:
            if self._seen is None:
                raise ConfigError(
                    f"{self._file} cannot be read ({error.strerror}); `python -m serve.keys NAME` "
                    "makes a line for it."
                ) from None
        except ConfigError:
            if self._seen is None:
                raise

    def _take(self, found: list[Key], seen: object) -> None:
        now = time.monotonic()
        if self._seen is not None and not set(self._filed) <= set(found):
            if self._fewer is None or self._fewer[0] != seen:
                self._fewer = seen, now
            if now - self._fewer[1] < SETTLE_S:
                return
        self._fewer, self._filed, self._seen = None, found, seen


def _watch(ring: weakref.ref[KeyRing]) -> None:
    while (watched := ring()) is not None:
        watched._read()
        del watched  # or it would never end
        time.sleep(LOOK_AGAIN_S)


def _text_of(file: Path) -> str:
    """Raises ConfigError where it is no text."""
    try:
        return file.read_text("utf-8")
    except UnicodeDecodeError:
        raise ConfigError(
            f"{file} must hold keys as UTF-8 text, but does not; `python -m serve.keys NAME` makes "
            "a line for it."
        ) from None


def parse_keys(text: str, source: str) -> list[Key]:
    """The keys of a file or variable.

    Raises:
        ConfigError: a line is none; the message names it without repeating it.
    """
    found = []
    for number, line in enumerate(re.split(r"[\n;]", text), 1):
        plain = line.split("#")[0].strip()
        if not plain:
            continue
        match = LINE.fullmatch(plain)
        if match is None:
            raise ConfigError(
                f"{source}, line {number}: a key is `NAME sha256:64-HEX-DIGITS [RATE]`; "
                "`python -m serve.keys NAME` makes one."
            )
        rate = int(match[3]) if match[3] else None
        found.append(Key(match[1], bytes.fromhex(match[2]), rate))
    return found


def make_key(name: str) -> tuple[str, str]:
    """A new key, and the line to keep of it."""
    key = f"rpt_{secrets.token_urlsafe(32)}"
    return key, f"{name} sha256:{hashlib.sha256(key.encode()).hexdigest()}"


class Rate:
    """A bucket of residues that fills again over a minute.

    One request may overdraw it once, so that a large one is not refused forever.
    """

    def __init__(self, per_minute: float) -> None:
        self._per_minute = per_minute
        self._left = per_minute
        self._at = time.monotonic()

    def take(self, residues: int) -> float:
        """0 if they may be computed, else the seconds to wait."""
        now = time.monotonic()
        self._left = min(self._per_minute, self._left + (now - self._at) * self._per_minute / 60.0)
        self._at = now
        if self._left <= 0:
            return (1 - self._left) * 60.0 / self._per_minute
        self._left -= residues
        return 0.0
