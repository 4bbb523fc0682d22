"""Which layers of a subject a task reads."""

from __future__ import annotations

from collections.abc import Sequence

from raptide.errors import ConfigError
from raptide.evaluation.subjects.subject import Subject


def layers_of(subject: Subject, asked: Sequence[int] | None) -> tuple[int, ...]:
    """Layers counted from the front, in order; of a subject without layers 0 alone.

    Args:
        asked: 0 is the embedding, -1 the last layer; by default the middle and the last.

    Raises:
        ConfigError: the subject has no such layer.
    """
    if not subject.layers:
        return (0,)
    last = subject.layers
    for layer in asked or ():
        if not -last <= layer <= last:
            raise ConfigError(
                f"`layers` asks for layer {layer}, but {subject.name} has layers 0 to {last}; "
                "ask for one of these, or for -1, the last."
            )
    wanted = (last // 2, last) if asked is None else tuple(asked)
    return tuple(sorted({layer if layer >= 0 else layer + last + 1 for layer in wanted}))
