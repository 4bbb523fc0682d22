"""What a request asks of its sequences: which residues, which variants, and what that costs."""

from __future__ import annotations

from raptide.alphabet import decode_residues, encode_residues
from raptide.calls.variants import apply_variant, parse_variant
from raptide.errors import SequenceError
from serve.calls import Ask, positions_of
from serve.gateway.refusals import invalid


def costs_of(
    ask: Ask, sequences: list[str], variants: list[str], positions: list[list[int]]
) -> list[int]:
    """Tokens to compute for each sequence; with variants, for them all."""
    if variants:
        return [ask.tokens(len(sequences[0]), positions_of(variants))]
    if positions:
        pairs = zip(sequences, positions, strict=True)
        return [ask.tokens(len(sequence), len(some)) for sequence, some in pairs]
    return [ask.tokens(len(sequence)) for sequence in sequences]


def check_positions(positions: list[list[int]], sequences: list[str]) -> None:
    """Raises Refusal where positions do not fit the sequences."""
    param = "masked_positions"
    if len(positions) != len(sequences):
        raise invalid(
            param,
            f"`{param}` needs a list for each sequence, but {len(positions)} were given for "
            f"{len(sequences)} sequences.",
        )
    for index, (sequence, some) in enumerate(zip(sequences, positions, strict=True)):
        outside = next((each for each in some if not 1 <= each <= len(sequence)), None)
        if outside is not None or not 0 < len(set(some)) == len(some):
            raise invalid(
                param,
                f"`{param}` names positions from 1 to {len(sequence)} of sequence {index}, at "
                f"least one and each once, but {some[:3] if outside is None else outside} was "
                "given.",
            )


def mutants(sequence: str, variants: list[str]) -> list[str]:
    """The wild type, and what each variant makes of it."""
    residues = encode_residues(sequence)
    try:
        changed = [apply_variant(residues, parse_variant(each, residues)) for each in variants]
    except SequenceError as error:
        raise invalid("variants", str(error)) from None
    return [sequence, *map(decode_residues, changed)]
