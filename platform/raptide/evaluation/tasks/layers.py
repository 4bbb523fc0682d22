"""Which layers of a subject a task reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from raptide.errors import InputError
from raptide.evaluation.subjects.subject import Subject

Layer = int | Literal["middle", "last"]
"""A number counts from the front (0 is the embedding), or from the back if negative."""


def layers_of(subject: Subject, asked: Sequence[Layer]) -> tuple[int, ...]:
    """Layers counted from the front, each once, in order; of a subject without layers 0 alone.

    Raises:
        InputError: the subject has none such.
    """
    if not subject.layers:
        return (0,)
    return tuple(sorted({resolve_layer(layer, subject) for layer in asked}))


def resolve_layer(layer: Layer, subject: Subject) -> int:
    """A layer of a subject, counted from the front.

    Raises:
        InputError: it has none such.
    """
    if layer == "middle":
        return (subject.layers + 1) // 2
    if layer == "last":
        return subject.layers
    found = layer + subject.layers + 1 if layer < 0 else layer
    if not 0 <= found <= subject.layers:
        raise InputError(
            f"{subject.name} has the layers 0 (its embedding) to {subject.layers}, but `layers` "
            f"names {layer}; name one of them, middle or last."
        )
    return found
