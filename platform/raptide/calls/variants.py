"""Variants in the notation of mutation tables: `A42G`, several substitutions as `A42G:K50R`."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from raptide.alphabet import FIRST_RESIDUE, RESIDUES, decode_residues, encode_residues
from raptide.errors import SequenceError

SUBSTITUTION = re.compile(r"([A-Za-z])([0-9]+)([A-Za-z])")

MOST_DIGITS = 9
"""Of a position: no protein has more residues."""


@dataclass(frozen=True)
class Substitution:
    """One residue in place of another; ids as in `alphabet.py`."""

    position: int
    """Counted from 0."""

    wild_type: int
    mutant: int


def parse_variant(variant: str, residues: np.ndarray, offset: int = 0) -> list[Substitution]:
    """The substitutions of a variant of the sequence `residues` ([L] uint8).

    Args:
        offset: number of the position before the sequence's first one.

    Raises:
        SequenceError: it is no such notation, or does not fit the sequence; the message names the
            variant, the position, and the letters expected and found.
    """
    if not isinstance(variant, str):
        raise SequenceError(
            f"A variant is a string like A42G, but {variant!r} was given; leave missing ones out."
        )
    found = [_parse(variant, part.strip(), residues, offset) for part in variant.split(":")]
    positions = [each.position for each in found]
    if len(set(positions)) < len(positions):
        twice = next(p for p in positions if positions.count(p) > 1)
        raise SequenceError(
            f"Variant {variant!r} changes position {twice + 1 + offset} twice; name each "
            "position once."
        )
    return found


def apply_variant(residues: np.ndarray, substitutions: list[Substitution]) -> np.ndarray:
    """The mutant sequence, [L] uint8."""
    mutant = residues.copy()
    for each in substitutions:
        mutant[each.position] = each.mutant
    return mutant


def spell_variant(substitutions: list[Substitution]) -> str:
    """Their notation, in the order of positions, counted from 1; "" for none."""
    return ":".join(
        f"{_letter(each.wild_type)}{each.position + 1}{_letter(each.mutant)}"
        for each in sorted(substitutions, key=lambda each: each.position)
    )


def _letter(residue: int) -> str:
    return RESIDUES[residue - FIRST_RESIDUE]


def _parse(variant: str, part: str, residues: np.ndarray, offset: int) -> Substitution:
    match = SUBSTITUTION.fullmatch(part)
    if match is None:
        raise SequenceError(
            f"A substitution is written like A42G (several joined by ':'), but {part!r} was given "
            f"in variant {variant!r}."
        )
    old, digits, new = match[1], match[2].lstrip("0"), match[3]
    number = int(digits[: MOST_DIGITS + 1] or 0)
    position = number - offset
    if not 1 <= position <= len(residues):
        shown = digits or "0"
        shown = shown if len(shown) <= MOST_DIGITS else f"{shown[:MOST_DIGITS]}..."
        raise SequenceError(
            f"Variant {variant[:40]!r}: position {shown} is outside the sequence, whose residues "
            f"are numbered {1 + offset} to {len(residues) + offset}."
        )
    wild_type, mutant = (int(encode_residues(letter)[0]) for letter in (old, new))
    if residues[position - 1] != wild_type:
        present = decode_residues(residues[position - 1 : position])
        raise SequenceError(
            f"Variant {variant!r} expects {old.upper()} at position {number}, but the sequence "
            f"has {present} there; positions are counted from {1 + offset}."
        )
    return Substitution(position - 1, wild_type, mutant)
