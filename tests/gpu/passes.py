"""The engine: embeddings, masked passes, contacts, and the memory they take."""

from __future__ import annotations

import statistics

import torch
from bench_tools import ROW_TOKENS, Bench, model_on, proteins, say

from raptide.inference.engine import Engine
from raptide.model.contacts import ContactHead

BATCH_TOKENS = (4096, 16_384, 65_536)


def main(device: str, limit_s: float) -> None:
    bench = Bench(device, limit_s)
    for size in ("650M", "35M") if bench.real else ("35M",):
        settings = bench.settings(size)
        model = model_on(settings, bench.device, torch.bfloat16).eval()
        heads = settings.layers * settings.heads
        model.contact_head = ContactHead(torch.randn(1, heads), torch.zeros(1))
        if bench.real:
            model.compile_layers()
        for most in BATCH_TOKENS if bench.real else (256,):
            if bench.late:
                say(f"{size}, {most} tokens", "no time left")
                continue
            measure(bench, f"{size}, {most} tokens", Engine(model, {}, bench.device, most))


def measure(bench: Bench, case: str, engine: Engine) -> None:
    count, longest = (512, ROW_TOKENS - 2) if bench.real else (5, 40)
    sequences = proteins(count, longest=longest)
    residues = sum(map(len, sequences))
    engine.embed(sequences)  # compiles, and fills the allocator
    bench.reset_peak()
    held = torch.cuda.memory_allocated() / 1e9 if bench.real else 0.0
    seconds = statistics.mean(bench.seconds(lambda: engine.embed(sequences)))
    say(case, "embeddings, mean", round(residues / seconds), "residues/s")
    more = bench.peak_gb() - held
    say(case, "memory beside the weights", round(more, 2), "GB", note=f"weights {held:.2f} GB")
    seconds = statistics.mean(bench.seconds(lambda: engine.embed(sequences, pooling="residue")))
    say(case, "embeddings, a residue", round(residues / seconds), "residues/s")
    some = [each[:300] for each in sequences[:4]]
    passed = sum(len(each) * len(each) for each in some)
    seconds = statistics.mean(bench.seconds(lambda: engine.score_sequences(some)))
    say(case, "masked passes", round(passed / seconds), "residues/s", note="each residue in turn")
    one = proteins(1, 3, 512)[0] if bench.real else sequences[0]
    seconds = statistics.mean(bench.seconds(lambda: engine.contacts([one])))
    say(case, f"contacts of {len(one)} residues", round(1e3 * seconds, 1), "ms")
