"""What is sent: the same proteins round and round, some to a request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from raptide.alphabet import decode_sequences
from raptide.data.building.synthetic import random_proteins
from raptide.data.fasta import read_fasta
from raptide.errors import ConfigError
from raptide.load.levels import Request

Encoding = Literal["base64", "float", "arrow"]

ARROW = "application/vnd.apache.arrow.stream"


def read_proteins(file: Path | None, count: int, longest: int) -> list[str]:
    """Up to `count` proteins of at most `longest` residues: of a FASTA file, or random ones.

    Raises:
        FastaError: the file is no protein FASTA.
        ConfigError: none of its proteins is short enough.
    """
    if file is None:
        return random_proteins(count, longest=longest)
    proteins: list[str] = []
    for batch in read_fasta(file):
        lengths = np.asarray(batch.lengths)
        letters = decode_sequences(np.frombuffer(batch.residues, np.uint8), lengths)
        proteins += [each for each in letters if len(each) <= longest]
        if len(proteins) >= count:
            break
    if not proteins:
        raise ConfigError(
            f"{file} holds no protein of at most {longest} residues; allow longer ones."
        )
    return proteins[:count]


def embedding_requests(
    proteins: Sequence[str], each: int, encoding: Encoding, **fields: Any
) -> Iterator[Request]:
    """Requests for embeddings of `each` proteins, without end; `fields` are added to the body."""
    endless = cycle(proteins)
    accept = ARROW if encoding == "arrow" else "application/json"
    if encoding != "arrow":
        fields["encoding_format"] = encoding
    while some := list(islice(endless, each)):
        body = {"input": some} | fields
        yield Request("/v1/embeddings", body, sum(map(len, some)), accept)


def score_requests(proteins: Sequence[str], each: int, **fields: Any) -> Iterator[Request]:
    """The same for scores from one pass."""
    endless = cycle(proteins)
    while some := list(islice(endless, each)):
        body = {"sequences": some, "method": "one-pass"} | fields
        yield Request("/v1/scores", body, sum(map(len, some)))
