"""What a study will take, before it takes it: tokens, operations, hours of its workers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from raptide.data.corpus import Corpus
from raptide.data.streaming.stream import Source, StreamPlan
from raptide.errors import CorpusError
from raptide.model.families import count_parameters
from raptide.scaling.study import PlannedRun, StudySettings
from raptide.training.planning.overview import epoch_size
from raptide.training.planning.recipe import Recipe

HOUR_S = 3600.0


@dataclass(frozen=True)
class Cost:
    """What one run takes; rows are taken for full, so these are upper bounds."""

    parameters: int
    tokens: int
    flops: float

    worker_hours: float | None
    """Hours of one worker, of as many as there are together; None where their speed is not
    known."""

    epochs: float | None
    """Times that the data are seen; None where the corpus is not here."""


def cost_of(recipe: Recipe, worker_tflops: float | None) -> Cost:
    """What a run takes, at the speed of one worker in 10^12 operations a second."""
    tokens = recipe.stream.rows_before(recipe.training.steps) * recipe.stream.row_tokens
    flops = flops_of(recipe, tokens)
    hours = flops / (worker_tflops * 1e12) / HOUR_S if worker_tflops else None
    epoch = epoch_tokens(recipe)
    epochs = tokens / epoch if epoch else None
    return Cost(count_parameters(recipe.model), tokens, flops, hours, epochs)


def flops_of(recipe: Recipe, tokens: float) -> float:
    """Operations of training on so many tokens, forward and backward; each crop is taken for a
    full one."""
    targets = tokens * (1.0 if recipe.model.blind else recipe.stream.mask_fraction)
    squared = tokens * recipe.stream.crop_tokens
    return 3 * recipe.model.forward_flops(tokens, squared, targets)


def epoch_tokens(recipe: Recipe) -> float | None:
    """Tokens of one epoch, over all corpora; None where one is not here."""
    try:
        corpora = [Corpus.open(share.path) for share in recipe.corpus]
    except CorpusError:
        return None
    sources = tuple(Source(corpus.everywhere, corpus.digest) for corpus in corpora)
    plan = StreamPlan(sources, recipe.stream, recipe.model.alphabet.name)
    return sum(epoch_size(plan, corpus).tokens for corpus in corpora)


def describe_grid(study: StudySettings, runs: Sequence[PlannedRun]) -> Iterator[str]:
    """The grid with its costs, a line a run and a total, for people."""
    wide = max(len(run.name) for run in runs)
    yield f"{'run':<{wide}}{'parameters':>14}{'workers':>9}{'tokens':>17}{'epochs':>9}{'hours':>11}"
    total_hours, total_flops, known = 0.0, 0.0, True
    for run in runs:
        cost = cost_of(run.recipe, study.worker_tflops)
        total_flops += cost.flops
        total_hours += cost.worker_hours or 0.0
        known &= cost.worker_hours is not None
        yield (
            f"{run.name:<{wide}}{cost.parameters:>14,}{run.recipe.cluster.max_workers:>9}"
            f"{cost.tokens:>17,}{_told(cost.epochs, 1):>9}{_told(cost.worker_hours, 2):>11}"
        )
    devices = "GPU" if runs[0].recipe.cluster.device == "cuda" else "worker"
    hours = f"about {total_hours:,.1f} {devices} hours" if known else "no speed is given"
    yield (
        f"{len(runs)} runs, {total_flops:.3g} operations, {hours}"
        + (f" at {study.worker_tflops:g} TFLOPS a worker" if study.worker_tflops else "")
        + "; all rows are taken for full, and starts, checkpoints and evaluations are not counted"
    )


def _told(value: float | None, places: int) -> str:
    return "-" if value is None else f"{value:,.{places}f}"
