"""Who owns what is made in a storage: of all attempts at it, the one that began last.

    attempts/000007-1f0c9a3e    {"host": …, "process": …, and what else the attempt says}

Each attempt makes a file of its own: a number above those that are there, and a random token. The
highest number wins, then the highest token. A listing decides, which every file system and every
bucket gives: nothing is locked, nobody's clock is compared with another's, and an attempt whose
machine nobody can reach any more is in nobody's way. Whoever finds another attempt above its own
ends.
"""

from __future__ import annotations

import json
import os
import re
import socket
import uuid
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from raptide.errors import RaptideError, Superseded
from raptide.storage import Storage

ATTEMPTS = "attempts"

KEPT = 20
"""Files of earlier attempts that stay."""


@dataclass(frozen=True, order=True)
class Attempt:
    """One attempt; a later one is greater."""

    number: int
    token: str

    @property
    def name(self) -> str:
        return f"{self.number:06d}-{self.token}"

    @classmethod
    def of(cls, name: str) -> Attempt | None:
        """The attempt of that name, None if it is no attempt's."""
        found = re.fullmatch(r"(\d+)-([0-9a-f]+)", name)
        return cls(int(found[1]), found[2]) if found else None


@dataclass(frozen=True)
class Attempts:
    """All attempts at what lies in a storage."""

    storage: Storage

    def all(self) -> list[Attempt]:
        """In order, the owner last."""
        return sorted(filter(None, map(Attempt.of, self.storage.names(ATTEMPTS))))

    def owner(self) -> Attempt | None:
        return next(reversed(self.all()), None)

    def begin(self, *, above: int = 0, **facts: Any) -> Attempt:
        """Begin an attempt, which takes over from all that there are.

        Args:
            above: its number is higher than this, too.
            facts: what it says of itself.

        Raises:
            Superseded: another began meanwhile.
            RaptideError: the storage fails.
        """
        earlier = self.all()
        number = max([above, *(each.number for each in earlier)]) + 1
        mine = Attempt(number, uuid.uuid4().hex[:8])
        said = json.dumps({"host": socket.gethostname(), "process": os.getpid(), **facts}).encode()
        try:
            self.storage.write(f"{ATTEMPTS}/{mine.name}", lambda file: file.write(said))
        except RaptideError:  # a full disk may have room for a name yet, which is what counts
            self.storage.write(f"{ATTEMPTS}/{mine.name}", lambda file: None)
        self.refuse_others(mine.name)
        with suppress(RaptideError):  # so few bytes may stay
            for old in earlier[:-KEPT]:
                self.storage.delete(f"{ATTEMPTS}/{old.name}")
        return mine

    def facts(self, attempt: Attempt) -> dict[str, Any]:
        """What an attempt says of itself; {} where nothing whole is left of it."""
        content = self.storage.find(f"{ATTEMPTS}/{attempt.name}")
        try:
            facts = json.loads(content or b"{}")
        except ValueError:
            return {}
        return facts if isinstance(facts, dict) else {}

    def refuse_others(self, mine: str) -> None:
        """Nothing as long as the attempt of that name owns the storage.

        Raises:
            Superseded: another attempt owns the storage; it is named, and when it began by the
                storage's clock.
            RaptideError: the storage fails.
        """
        owner = self.owner()
        if owner is not None and owner.name == mine:
            return
        other = self._describe(owner) if owner is not None else "finished or begun anew since"
        raise Superseded(
            f"Another attempt has taken over {self.storage.path} ({other}); this one, {mine}, "
            "ends, so that nothing is done twice: stop the other before you start this one again."
        )

    def _describe(self, attempt: Attempt) -> str:
        facts = self.facts(attempt)
        who = f"process {facts['process']} on {facts['host']}" if facts else "on an unknown host"
        began = self.storage.changed(f"{ATTEMPTS}/{attempt.name}")
        when = f", since {began:%Y-%m-%d %H:%M:%S} UTC" if began is not None else ""
        return f"{attempt.name}, {who}{when}"
