"""The plan of a run, for people: what it will take, how many steps and epochs it has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from raptide.alphabet import ALPHABETS
from raptide.data.corpus import LENGTH_BIN, Corpus
from raptide.data.streaming.batch import StreamSettings
from raptide.data.streaming.stream import StreamPlan
from raptide.model.families import count_parameters
from raptide.training.planning.estimate import checkpoint_bytes, worker_memory
from raptide.training.planning.recipe import Recipe


@dataclass(frozen=True)
class EpochSize:
    """What one epoch of a stream holds."""

    sequences: float
    tokens: float
    """With specials and crops; estimated from the corpus's length histogram."""


def epoch_size(plan: StreamPlan, corpus: Corpus) -> EpochSize:
    """Sequences and tokens of one epoch, under the plan's sampling, fraction and crop."""
    counts = corpus.manifest["counts"]["train"]
    drawn = counts["sequences"] if plan.settings.sampling == "all" else counts["clusters"]
    histogram = corpus.manifest["length_histogram"]["train"]
    starts = np.array([int(start) for start in histogram])
    shares = np.array(list(histogram.values())) / sum(histogram.values())
    full = starts + LENGTH_BIN / 2 + ALPHABETS[plan.alphabet].num_specials
    mean = float((np.minimum(full, plan.settings.crop_tokens) * shares).sum())
    sequences = drawn * plan.settings.fraction
    return EpochSize(sequences, sequences * mean)


def describe_run(recipe: Recipe, plan: StreamPlan) -> str:
    """The plan of a run, for people."""
    stream, training = recipe.stream, recipe.training
    model, step_tokens = recipe.model, stream.batch_rows * stream.row_tokens
    tokens = stream.rows_before(training.steps) * stream.row_tokens
    described = [
        (
            "model",
            f"{model.family}, {model.layers} layers of {model.width}, "
            f"{count_parameters(model):,} parameters, " + _describe_start(recipe),
        ),
        *_describe_corpora(plan, tokens),
        (
            "a step",
            f"{stream.batch_rows} rows of {stream.row_tokens}: {step_tokens:,} tokens"
            f"{_growth(stream)}; "
            + ", or ".join(
                f"{workers} workers, {recipe.accumulation(workers)} times "
                f"{training.micro_batch_rows} rows"
                for workers in _sizes(recipe)
            ),
        ),
        ("the run", f"{training.steps:,} steps, at most {tokens:,} tokens"),
        *(("a worker", _describe_memory(recipe, workers)) for workers in _sizes(recipe)),
        (
            "checkpoints",
            f"{training.steps // recipe.checkpoint.every_steps} of about "
            f"{checkpoint_bytes(recipe) / 1e9:.2f} GB{_with_bundles(recipe)}, the newest "
            f"{recipe.checkpoint.keep} kept, in {recipe.checkpoint.storage or 'the run folder'}",
        ),
        (
            "evaluations",
            f"{training.steps // recipe.evaluation.every_steps} on {recipe.evaluation.blocks} "
            "held-out blocks, "
            + ("beside the training" if recipe.evaluation.asynchronous else "by the workers"),
        ),
        ("DeepSpeed", f"ZeRO {training.zero_stage}, {training.precision}, its own check passed"),
    ]
    return "\n".join(f"  {name:12} {what}" for name, what in described)


def _growth(stream: StreamSettings) -> str:
    if not stream.batch_warmup_steps:
        return ""
    return (
        f" (growing from {stream.first_batch_rows} rows over {stream.batch_warmup_steps:,} steps)"
    )


def _describe_start(recipe: Recipe) -> str:
    if recipe.continue_from is not None:
        return f"going on from {recipe.continue_from}, whose steps are done"
    return f"from {recipe.init_from}" if recipe.init_from else "fresh"


def _sizes(recipe: Recipe) -> list[int]:
    """The fewest and the most workers."""
    return sorted(set(recipe.cluster.workers))


def _describe_corpora(plan: StreamPlan, tokens: int) -> Iterator[tuple[str, str]]:
    total = sum(source.weight for source in plan.sources)
    for source in plan.sources:
        corpus, share = source.open(), source.weight / total
        epoch = epoch_size(plan, corpus)
        mixed = f", {share:.1%} of the tokens" if len(plan.sources) > 1 else ""
        yield "corpus", f"{source.path}, digest {source.digest[:16]}, every file verified{mixed}"
        yield (
            "an epoch",
            f"{epoch.sequences:,.0f} sequences ({plan.settings.sampling}), about "
            f"{epoch.tokens:,.0f} tokens; the run takes "
            f"{tokens * share / max(epoch.tokens, 1):.2f} epochs",
        )


def _with_bundles(recipe: Recipe) -> str:
    every = recipe.checkpoint.bundle_every
    return f" with a bundle, which one in {every} has" if every > 1 else ""


def _describe_memory(recipe: Recipe, workers: int) -> str:
    memory = worker_memory(recipe, workers)
    return f"{memory} with {workers} workers, and what the device's own software takes"
