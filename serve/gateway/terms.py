"""What every call over HTTP may say in its headers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Header

OURS = ("X-Raptide-Timeout-S", "X-Raptide-Weights")
"""Request headers of our own, which pages elsewhere may send, too."""

LONGEST_ID = 128
"""Characters of a request's id that are kept; a client may send any number."""


@dataclass(frozen=True)
class Terms:
    """On what terms a client asks."""

    timeout_s: float | None
    """Seconds after which the answer is of no use."""

    weights: str
    """The digest of the only weights that may answer; empty: any."""

    request_id: str
    """What the client calls this request; empty: nothing."""


def _terms(
    timeout_s: Annotated[
        float | None,
        Header(
            alias="X-Raptide-Timeout-S",
            gt=0,
            description="Seconds after which the answer is of no use: 504 then",
        ),
    ] = None,
    weights: Annotated[
        str | None,
        Header(
            alias="X-Raptide-Weights",
            description="16 hex digits, as answers have them: these weights answer, or 410 says "
            "that they are served no longer",
        ),
    ] = None,
    request_id: Annotated[
        str | None,
        Header(
            alias="X-Request-Id",
            description="Comes back with the answer and stands in every line of the logs",
        ),
    ] = None,
) -> Terms:
    return Terms(timeout_s, weights or "", request_id or "")


AskedTerms = Annotated[Terms, Depends(_terms)]
