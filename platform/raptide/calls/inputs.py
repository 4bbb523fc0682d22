"""What calls give, checked: strings to residue ids, with their place in the call in every error."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, get_args

import numpy as np

from raptide.alphabet import encode_residues
from raptide.errors import ConfigError, SequenceError


def read_sequences(sequences: Sequence[str], limit: float) -> list[np.ndarray]:
    """Residue ids of each sequence, [L] uint8.

    Raises:
        SequenceError: one is empty, longer than `limit` residues, or holds what is no residue.
    """
    refuse_no_list(sequences, "sequences")
    return [read_sequence(sequence, index, limit) for index, sequence in enumerate(sequences)]


def refuse_no_list(given: object, what: str) -> None:
    """What looks like a list and is none would be read letter by letter, by key or in any order.

    Raises:
        SequenceError: `given` is a string, a mapping or a set.
    """
    if isinstance(given, str):
        raise SequenceError(f"A list of {what} is needed, but one string was given: use [it].")
    if isinstance(given, Mapping):
        raise SequenceError(
            f"A list of {what} is needed, but a {type(given).__name__} was given: use "
            "list(it.values())."
        )
    if isinstance(given, Set):
        raise SequenceError(
            f"A list of {what} is needed, but a {type(given).__name__} was given, which has no "
            "order: use sorted(it)."
        )


def read_ahead(sequences: Iterator[str], limit: float, budget: int) -> Iterator[list[np.ndarray]]:
    """The same for an iterator, in lists of about `budget` residues."""
    held: list[np.ndarray] = []
    room = budget
    for index, sequence in enumerate(sequences):
        held.append(read_sequence(sequence, index, limit))
        room -= len(held[-1])
        if room <= 0:
            yield held
            held, room = [], budget
    yield held


def read_layers(layers: Sequence[int], last: int) -> list[int]:
    """Layers as they are counted from 0, the embedding, to `last`; negative ones from the end.

    Raises:
        ConfigError: there are none, or the model has no such layer.
    """
    return [_layer(layer, last) for layer in plain_layers(layers)]


def plain_layers(layers: Sequence[int]) -> list[int]:
    """Layers as whole numbers, whatever the model has.

    Raises:
        ConfigError: there are none, or one is no whole number.
    """
    if not isinstance(layers, Iterable) or isinstance(layers, str):
        raise ConfigError(f"layers must be a list such as (-1,), but {layers!r} was given.")
    wanted = list(layers)
    for layer in wanted:
        if isinstance(layer, bool) or not isinstance(layer, int | np.integer):
            raise ConfigError(f"A layer is a whole number, but {layer!r} was given.")
    if not wanted:
        raise ConfigError("At least one layer must be asked for; the last one is -1.")
    return [int(layer) for layer in wanted]


def _layer(layer: int, last: int) -> int:
    index = layer + last + 1 if layer < 0 else layer
    if not 0 <= index <= last:
        raise ConfigError(
            f"This model has layers 0 to {last} (or -1 to {-last - 1}), but layer {layer} was "
            "asked for."
        )
    return index


def refuse_unknown(name: str, value: str, choices: Any) -> None:
    """Raises ConfigError where a value is none of a Literal's choices."""
    if value not in get_args(choices):
        known = ", ".join(map(repr, get_args(choices)))
        raise ConfigError(f"{name} must be one of {known}, but {value!r} was given.")


def read_sequence(sequence: str, index: int, limit: float = float("inf")) -> np.ndarray:
    """Residue ids of one sequence, [L] uint8.

    Args:
        index: its place in the call, for errors.

    Raises:
        SequenceError: as in `read_sequences`.
    """
    if not isinstance(sequence, str):
        raise SequenceError(
            f"Sequence {index}: a string of residue letters is needed, but a "
            f"{type(sequence).__name__} was given."
        )
    try:
        residues = encode_residues(sequence)
    except SequenceError as error:
        raise SequenceError(f"Sequence {index}: {error}") from None
    if len(residues) > limit:
        raise SequenceError(
            f"Sequence {index}: at most {limit} residues are taken whole, but {len(residues)} were "
            "given; cut it into domains, or take overlapping windows where they are offered "
            '(long="window").'
        )
    return residues
