"""The ESM alphabets, and residues as bytes.

A corpus stores residue ids, never specials. Both alphabets give the 27 residue letters the same
ids (4 to 30), so one corpus serves every model; only the specials differ.

How letters are read, everywhere (FASTA, engine, endpoint):

- lower case counts as upper case; white space is skipped; one trailing `*` (stop) is dropped;
- the letters A to Z are residues, and `J` (leucine or isoleucine), which has no token, reads as X;
- everything else (digits, gaps, an inner `*`) is refused with its position.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from raptide.errors import SequenceError

FIRST_RESIDUE = 4
"""Id of the first residue letter, in both alphabets."""

RESIDUES = "LAGVSERTIDPKQNFYMHWCXBUZO.-"
"""The residue letters by id, from FIRST_RESIDUE on; the first 20 are the standard ones."""

NUM_STANDARD = 20

STANDARD = "ACDEFGHIKLMNPQRSTVWY"
"""The 20 standard residues in alphabetical order: the columns of a scan."""

BAD_RESIDUE = 0xFF
"""What `RESIDUE_IDS` holds for a byte that is no residue letter."""

WHITE_SPACE = b" \t\r\n"
_NO_BLANKS = dict.fromkeys(WHITE_SPACE)


def _residue_table() -> bytes:
    table = bytearray([BAD_RESIDUE] * 256)
    for letter in string.ascii_uppercase:
        index = RESIDUES.find("X" if letter == "J" else letter)
        table[ord(letter)] = table[ord(letter.lower())] = FIRST_RESIDUE + index
    return bytes(table)


RESIDUE_IDS = _residue_table()
"""256 bytes: ASCII letter to residue id, for `bytes.translate`."""


@dataclass(frozen=True)
class Alphabet:
    """A token alphabet: the specials around the shared residue ids."""

    name: str
    tokens: tuple[str, ...]
    append_eos: bool
    """Whether a sequence ends with `<eos>` (ESM-1 models prepend `<cls>` only)."""

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def cls(self) -> int:
        return self.tokens.index("<cls>")

    @cached_property
    def pad(self) -> int:
        return self.tokens.index("<pad>")

    @cached_property
    def eos(self) -> int:
        return self.tokens.index("<eos>")

    @cached_property
    def mask(self) -> int:
        return self.tokens.index("<mask>")

    @property
    def num_specials(self) -> int:
        """Specials added around one sequence."""
        return 2 if self.append_eos else 1

    def add_specials(self, residues: np.ndarray) -> np.ndarray:
        """Residue ids [L] uint8 to tokens [L + num_specials] uint8."""
        tail = [self.eos] if self.append_eos else []
        return np.concatenate([[self.cls], residues, tail]).astype(np.uint8)


ESM_33 = Alphabet(
    name="esm-33",
    tokens=("<cls>", "<pad>", "<eos>", "<unk>", *RESIDUES, "<null_1>", "<mask>"),
    append_eos=True,
)
"""ESM-1b and ESM-2, and Hugging Face's EsmTokenizer."""

ESM_35 = Alphabet(
    name="esm-35",
    tokens=(
        *("<null_0>", "<pad>", "<eos>", "<unk>"),
        *RESIDUES,
        *("<null_1>", "<cls>", "<mask>", "<sep>"),
    ),
    append_eos=False,
)
"""ESM-1."""

ALPHABETS = {alphabet.name: alphabet for alphabet in (ESM_33, ESM_35)}


LETTERS = bytes.maketrans(
    bytes(range(FIRST_RESIDUE, FIRST_RESIDUE + len(RESIDUES))), RESIDUES.encode()
)
"""256 bytes: residue id to ASCII letter, for `bytes.translate`."""


def drop_blanks(letters: str) -> str:
    """The letters that are looked up, without the white space a sequence may hold."""
    return letters.translate(_NO_BLANKS)


def translate_letters(letters: str) -> bytes:
    """Letters to residue ids by the rule above, unchecked: what is no residue is BAD_RESIDUE."""
    ids = letters.encode("ascii", "replace").translate(RESIDUE_IDS, WHITE_SPACE)
    if ids.endswith(b"\xff") and letters.rstrip(WHITE_SPACE.decode()).endswith("*"):
        return ids[:-1]
    return ids


def translate_batch(sequences: Sequence[str]) -> tuple[bytes, np.ndarray]:
    """Letters of many sequences to residue ids end to end, and the length of each, [n] int64.

    As unchecked as `translate_letters`. Plain letters take one lookup over all of them together.
    """
    ids = "".join(sequences).encode("ascii", "replace").translate(RESIDUE_IDS)
    if BAD_RESIDUE in ids:
        chunks = [translate_letters(letters) for letters in sequences]
        return b"".join(chunks), np.fromiter(map(len, chunks), np.int64, len(chunks))
    return ids, np.fromiter(map(len, sequences), np.int64, len(sequences))


def encode_residues(letters: str) -> np.ndarray:
    """Letters to residue ids [L] uint8.

    Raises:
        SequenceError: the sequence is empty, or holds something that is no residue letter.
    """
    ids = translate_letters(letters)
    if not ids:
        raise SequenceError("A sequence needs at least one residue, but this one is empty.")
    bad = ids.find(BAD_RESIDUE)
    if bad >= 0:
        raise SequenceError(describe_bad_residue(letters, bad))
    return np.frombuffer(ids, np.uint8)


def decode_residues(residues: np.ndarray) -> str:
    """Residue ids [L] uint8 back to letters."""
    return residues.tobytes().translate(LETTERS).decode()


def decode_sequences(residues: np.ndarray, lengths: np.ndarray) -> list[str]:
    """Sequences that lie end to end in `residues` [sum of lengths] uint8, as letters."""
    ends = np.cumsum(lengths)
    return [decode_residues(residues[a:b]) for a, b in zip(ends - lengths, ends, strict=True)]


def count_letters(residues: np.ndarray) -> np.ndarray:
    """How often each residue letter occurs among token ids of any shape, [27] int64."""
    counts = np.bincount(residues.ravel(), minlength=256)
    return counts[FIRST_RESIDUE : FIRST_RESIDUE + len(RESIDUES)]


def describe_bad_residue(letters: str, index: int) -> str:
    """One sentence about the `index`-th non-blank character of `letters`."""
    character = drop_blanks(letters)[index]
    shown = repr(character) if character.isprintable() else f"the character {ord(character):#04x}"
    return (
        f"Residues are the letters A to Z, but position {index + 1} holds {shown}; "
        "remove it, or write X for an unknown residue."
    )
