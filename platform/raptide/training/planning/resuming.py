"""What may change between two starts of one run, and what may not.

Every field of a recipe is read anew at each start, but for those that are named here: what a
checkpoint holds was made with them, so another value would be recorded and never used.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from raptide.config import Settings
from raptide.errors import CheckpointError
from raptide.storage import is_uri
from raptide.training.planning.recipe import Recipe

FIXED = {
    "init_from": "weights are only started from once",
    "continue_from": "it was gone on from once",
    "model": "the checkpoint holds its weights",
    "stream": "its cursor is a place in that stream",
    "optimizer.matrices": "AdamW and Muon keep different states",
    "optimizer.fused": "kernels keep Adam's state in different forms",
    "training.precision": "the optimizer's state is kept in its form",
    "training.zero_stage": "DeepSpeed does not convert between stages",
    "training.seed": "it seeds fresh weights alone",
    "training.rotary_base": "the checkpoint holds the frequencies",
    "checkpoint.storage": "the run's earlier checkpoints lie there",
    "evaluation.blocks": "earlier evaluations and the unigram baseline are of those",
    "evaluation.seed": "earlier evaluations and the unigram baseline are of that",
}
"""Fields, or whole sections, that stay as they are, and why."""

FREE = ("stream.lookahead_mb",)
"""What may change of a section that stays."""


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """The same recipe from any working directory."""
    corpora = tuple(
        share.model_copy(update={"path": _absolute(share.path)}) for share in recipe.corpus
    )
    init_from, continue_from = (
        None if start is None else _absolute(start)
        for start in (recipe.init_from, recipe.continue_from)
    )
    evaluation = recipe.evaluation
    if evaluation.benchmark is not None:
        file = str(Path(evaluation.benchmark).resolve())
        evaluation = evaluation.model_copy(update={"benchmark": file})
    return recipe.model_copy(
        update={
            "corpus": corpora,
            "init_from": init_from,
            "continue_from": continue_from,
            "evaluation": evaluation,
        }
    )


def changed_fields(before: Recipe, now: Recipe) -> dict[str, tuple[Any, Any]]:
    """Both values, as they are written, of each field in which two recipes differ."""
    old, new = (dict(_fields(with_absolute_paths(recipe))) for recipe in (before, now))
    both = {name: (old.get(name), new.get(name)) for name in old | new}  # families have their own
    return {name: (there, here) for name, (there, here) in both.items() if there != here}


def _absolute(path: str) -> str:
    return path if is_uri(path) else str(Path(path).resolve())


def _fields(settings: Settings, section: str = "") -> Iterator[tuple[str, Any]]:
    written = settings.model_dump()
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if isinstance(value, Settings):
            yield from _fields(value, f"{section}{name}.")
        else:
            yield f"{section}{name}", written[name]


def why_fixed(field: str) -> str | None:
    """Why a resumed run cannot change a field; None where it can."""
    if field in FREE:
        return None
    return FIXED.get(field) or FIXED.get(field.split(".")[0])


def refuse_changes(before: Recipe, now: Recipe, checkpoint: str) -> None:
    """Refuse to go on from a checkpoint with a recipe that it does not fit.

    Raises:
        CheckpointError: names the first field that cannot change.
    """
    for field, (old, new) in changed_fields(before, now).items():
        reason = why_fixed(field)
        if reason is not None:
            written = "null" if old is None else old
            raise CheckpointError(
                f"{checkpoint} was saved with {field}={written}, which a resumed run cannot change "
                f"to {new} ({reason}); resume with {field}={written}, or start a new run."
            )
