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
from raptide.training.planning.optimizer import LINEAR_UNTIL, cooldown_begin
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
        ("masks", _describe_masks(recipe)),
        ("the run", f"{training.steps:,} steps, at most {tokens:,} tokens"),
        *_describe_updates(recipe),
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


def _describe_masks(recipe: Recipe) -> str:
    if recipe.model.blind:
        return "none: every residue is a target, and hidden from its own prediction"
    return f"{recipe.stream.mask_fraction:.0%} of the residues are targets"


def _describe_updates(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """What moves the weights, at which rates, and when they fall."""
    given, steps = recipe.optimizer, recipe.training.steps
    adam = f"{'AdamW' if given.weight_decay else 'Adam'} at {given.lr:g}"
    if given.matrices == "muon":
        adam = f"Muon at {given.muon_rate:g} for the matrices, {adam} for the rest"
    yield (
        "updates",
        f"{adam}; weight decay {given.weight_decay:g}, gradients clipped at {given.clip_norm:g}"
        if given.clip_norm
        else f"{adam}; weight decay {given.weight_decay:g}, gradients not clipped",
    )
    falls = {
        "inverse_sqrt": "then falling with 1/sqrt(step)",
        "linear": f"then in a line to a tenth at step {round(LINEAR_UNTIL * steps):,}",
        "stable": f"level until step {cooldown_begin(given, steps):,}, then in a line to 0",
    }
    yield "the rate", f"{given.warmup_steps:,} steps of warm-up, {falls[given.decay]}"


def _growth(stream: StreamSettings) -> str:
    if not stream.batch_warmup_steps:
        return ""
    return (
        f" (growing from {stream.first_batch_rows} rows over {stream.batch_warmup_steps:,} steps)"
    )


def _describe_start(recipe: Recipe) -> str:
    if recipe.continue_from is not None:
        return f"going on from {recipe.continue_from}, whose steps are done"
    if recipe.init_from is not None:
        return f"from {recipe.init_from}"
    return f"fresh, rotary base {recipe.training.rotary_base:g}" if recipe.model.rotary else "fresh"


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
    every, over = recipe.checkpoint.bundle_every, recipe.checkpoint.average_over
    if over is not None:
        return f" with a bundle of the mean over about {over} of them"
    return f" with a bundle, which one in {every} has" if every > 1 else ""


def _describe_memory(recipe: Recipe, workers: int) -> str:
    memory = worker_memory(recipe, workers)
    return f"{memory} with {workers} workers, and what the device's own software takes"
