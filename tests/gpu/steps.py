"""How fast a training step is, and what it takes: bf16, packed rows, no DeepSpeed around it."""

from __future__ import annotations

import itertools
import statistics
from dataclasses import dataclass

import torch
from bare_engine import BareEngine
from bench_tools import ROW_TOKENS, Bench, model_on, packed_batch, say, say_goal

from raptide.config import parse_settings
from raptide.model.config import ModelSettings
from raptide.training.batches import Share, cut_share, share_bounds
from raptide.training.planning.estimate import peak_flops, step_flops, worker_memory
from raptide.training.planning.recipe import Recipe
from raptide.training.step import Stepper

GOAL_TOKENS_PER_S = 100_000
"""Unpadded, at 650M on an H100; BioNeMo states 95,871, about 42% MFU."""

DISTINCT = 4
"""Batches of other lengths, in turn."""


@dataclass(frozen=True)
class Case:
    size: str
    rows: int
    compile: bool = True
    checkpoint: bool = False

    def __str__(self) -> str:
        told = (", compiled" * self.compile) + (", checkpointed" * self.checkpoint)
        return f"{self.size}, {self.rows} rows{told}"


CASES = (
    Case("650M", 16),
    Case("650M", 16, compile=False),
    Case("650M", 8),
    Case("650M", 32),
    Case("ESM-1 670M", 16),
    Case("650M", 32, checkpoint=True),
    Case("35M", 32),
    Case("35M", 16),
    Case("35M", 8),
    Case("35M", 16, compile=False),
    Case("35M", 32, checkpoint=True),
)


def main(device: str, limit_s: float) -> None:
    bench = Bench(device, limit_s)
    for case in CASES if bench.real else CASES[4:6]:
        if bench.late:
            say(str(case), "no time left")
            continue
        try:
            measure(bench, case)
        except torch.OutOfMemoryError:
            say(str(case), "out of memory", verdict="missed")
        bench.reset_peak()
    compare_projections(bench)


def measure(bench: Bench, case: Case) -> None:
    bench.reset_peak()
    settings = bench.settings(case.size)
    model = model_on(settings, bench.device, torch.bfloat16)
    model.checkpoint_activations = case.checkpoint
    if case.compile:
        model.compile_layers()
    stepper = Stepper(BareEngine(model, bench.device), 1)
    shares = [a_share(bench, case, settings, seed) for seed in range(DISTINCT)]
    losses = [stepper.step(share, 1e-4).loss for share in shares]
    graphs = num_graphs()
    turns = itertools.cycle(shares)
    with bench.counting_syncs() as syncs:
        losses.append(stepper.step(next(turns), 1e-4).loss)
    seconds = bench.seconds(lambda: stepper.step(next(turns), 1e-4))
    report_speed(bench, case, shares, seconds)
    say(str(case), "calls that wait, a step", sum(syncs.values()), note=str(dict(syncs)))
    again = num_graphs() - graphs
    say(str(case), "compiled again", again, verdict="ok" if again == 0 else "missed")
    report_memory(bench, case, settings)
    finite = all(map(torch.isfinite, map(torch.tensor, losses)))
    falls = losses[-1] < losses[0] if bench.real else True
    verdict = "ok" if finite and falls else "WRONG"
    say(str(case), "loss", f"{losses[0]:.3f} to {losses[-1]:.3f}", "nats", verdict=verdict)


def a_share(bench: Bench, case: Case, settings: ModelSettings, seed: int) -> Share:
    rows, tokens = (case.rows, ROW_TOKENS) if bench.real else (2, 64)
    batch = packed_batch(rows, tokens, settings.alphabet, seed)
    return cut_share(share_bounds(rows, 0, 1, rows, 1), settings.alphabet, bench.device, batch)


def compare_projections(bench: Bench) -> None:
    """Queries, keys and values as one product against the three that the model makes.

    The weights are put together for each call, as checkpoints and optimizers know them apart.
    """
    settings = bench.settings("650M")
    model = model_on(settings, bench.device, torch.bfloat16)
    attention = model.layers[0].attention
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    tokens = 16 * ROW_TOKENS if bench.real else 64
    x_TD = torch.randn(tokens, settings.width, device=bench.device, dtype=torch.bfloat16)
    x_TD.requires_grad_()

    def apart() -> None:
        torch.stack([each(x_TD).sum() for each in projections]).sum().backward()

    def together() -> None:
        weight = torch.cat([each.weight for each in projections])
        bias = torch.cat([each.bias for each in projections])
        torch.nn.functional.linear(x_TD, weight, bias).sum().backward()

    apart(), together()
    three, one = (min(bench.seconds(each, least_s=0.5)) for each in (apart, together))
    note = f"{tokens} tokens, back as well; above 1 it would pay to put them together"
    say("650M", "three products over one", round(three / one, 3), note=note)


def report_speed(bench: Bench, case: Case, shares: list[Share], seconds: list[float]) -> None:
    """Of the batches' mean, since they are taken in turn."""
    settings, step_s = bench.settings(case.size), statistics.mean(seconds)
    tokens = statistics.mean(share.batch.num_tokens for share in shares) / step_s
    spread = f"{len(seconds)} steps, {min(seconds) * 1e3:.1f} to {max(seconds) * 1e3:.1f} ms"
    if case.size == "650M" and case.compile and not case.checkpoint:
        say_goal(str(case), "training", round(tokens), "tokens/s", GOAL_TOKENS_PER_S, spread)
    else:
        say(str(case), "training", round(tokens), "tokens/s", note=spread)
    peak = peak_flops(recipe_of(case, settings), bench.device.type)
    flops = statistics.mean(step_flops(settings, share.batch) for share in shares) / step_s
    say(str(case), "arithmetic", round(flops / 1e12, 1), "TFLOP/s")
    if peak is not None:
        say(str(case), "MFU", round(flops / peak, 3))


def report_memory(bench: Bench, case: Case, settings: ModelSettings) -> None:
    estimate = worker_memory(recipe_of(case, settings), 1).total / 1e9
    found = bench.peak_gb()
    share = f"{found / estimate:.2f} of the estimate, {estimate:.2f} GB"
    say(str(case), "peak memory", round(found, 2), "GB", note=share)


def recipe_of(case: Case, settings: ModelSettings) -> Recipe:
    """What a run with one worker and without ZeRO would be."""
    training = {"steps": 1, "micro_batch_rows": case.rows, "zero_stage": 0}
    tree = {
        "name": "gpu",
        "corpus": "none",
        "stream": {"row_tokens": ROW_TOKENS, "batch_rows": case.rows},
        "model": settings.model_dump(),
        "training": training | {"checkpoint_activations": case.checkpoint},
        "cluster": {"workers": 1},
    }
    return parse_settings(Recipe, tree, source="gpu")


def num_graphs() -> int:
    """Graphs that Dynamo has made so far."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
