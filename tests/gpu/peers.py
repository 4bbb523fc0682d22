"""The same GPU, the same proteins, transformers' EsmForMaskedLM: in turn with Raptide."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from bare_engine import BareEngine
from bench_tools import ROW_TOKENS, Bench, model_on, packed_batch, proteins, say, say_goal

from raptide.alphabet import ESM_33, FIRST_RESIDUE, encode_residues
from raptide.inference.engine import Engine
from raptide.training.batches import cut_share, share_bounds
from raptide.training.step import Stepper

GOAL_ENGINE = 2.5
"""Times transformers with SDPA, embeddings at 650M."""

BATCH_TOKENS = 16_384
TURNS = 3


def main(device: str, limit_s: float) -> None:
    bench = Bench(device, limit_s)
    if find_spec("transformers") is None:
        say("transformers", "not installed", note="pip install transformers")
        return
    import transformers

    print(json.dumps({"facts": {"transformers": transformers.__version__}}), flush=True)
    kinds = ["sdpa"] + ["flash_attention_2"] * (find_spec("flash_attn") is not None and bench.real)
    for size in ("650M", "35M") if bench.real else ("35M",):
        for kind in kinds:
            if bench.late:
                say(f"{size}, {kind}", "no time left")
                continue
            embeddings(bench, size, kind)
            training(bench, size, kind)


def theirs(bench: Bench, size: str, kind: str) -> Any:
    from transformers import EsmConfig, EsmForMaskedLM

    settings = bench.settings(size)
    config = EsmConfig(
        vocab_size=len(ESM_33),
        hidden_size=settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        intermediate_size=settings.ffn_width,
        position_embedding_type="rotary",
        token_dropout=True,
        mask_token_id=ESM_33.mask,
        pad_token_id=ESM_33.pad,
        attention_probs_dropout_prob=0.0,
        hidden_dropout_prob=0.0,
    )
    config._attn_implementation = kind
    with bench.device:
        return EsmForMaskedLM(config).to(bench.device, torch.bfloat16)


def embeddings(bench: Bench, size: str, kind: str) -> None:
    count, most = (512, BATCH_TOKENS) if bench.real else (6, 128)
    sequences = proteins(count, longest=ROW_TOKENS - 2 if bench.real else 50)
    residues = sum(map(len, sequences))
    model = model_on(bench.settings(size), bench.device, torch.bfloat16).eval()
    model.compile_layers()
    engine = Engine(model, {}, bench.device, most)
    peer = theirs(bench, size, kind).eval()
    batches = [batch[:2] for batch in padded(bench, sequences, most)]

    def embed_theirs() -> None:
        with torch.inference_mode():
            for tokens, mask in batches:
                hidden = peer.esm(input_ids=tokens, attention_mask=mask).last_hidden_state
                (hidden * mask[:, :, None]).sum(1).float().cpu()

    ours, others = in_turn(bench, lambda: engine.embed(sequences), embed_theirs)
    case = f"{size}, {kind}"
    say(case, "embeddings, transformers sorted", round(residues / others), "residues/s")
    say(case, "embeddings, raptide", round(residues / ours), "residues/s")
    if size == "650M" and kind == "sdpa":
        say_goal(case, "embeddings, raptide over transformers", others / ours, "times", GOAL_ENGINE)
    else:
        say(case, "embeddings, raptide over transformers", round(others / ours, 2), "times")


def training(bench: Bench, size: str, kind: str) -> None:
    """Steps of about as many tokens; theirs with all weights and moments in bf16."""
    settings = bench.settings(size)
    rows, tokens = (16, ROW_TOKENS) if bench.real else (2, 64)
    batch = packed_batch(rows, tokens, settings.alphabet, 1)
    share = cut_share(share_bounds(rows, 0, 1, rows, 1), ESM_33, bench.device, batch)
    model = model_on(settings, bench.device, torch.bfloat16)
    model.compile_layers()
    stepper = Stepper(BareEngine(model, bench.device), 1)
    peer = theirs(bench, size, kind)
    optimizer = torch.optim.AdamW(peer.parameters(), lr=1e-4, fused=True)
    turns = itertools.cycle(padded(bench, proteins(16 * rows, 2, tokens - 2), rows * tokens))
    seen: list[int] = []

    def step_theirs() -> None:
        ids, mask, labels = next(turns)
        peer(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
        seen.append(int(mask.sum()))

    ours, others = in_turn(bench, lambda: stepper.step(share, 1e-4), step_theirs)
    mine, yours = batch.num_tokens / ours, statistics.mean(seen) / others
    case = f"{size}, {kind}"
    say(case, "training, transformers sorted", round(yours), "tokens/s")
    say(case, "training, raptide", round(mine), "tokens/s")
    say(case, "training, raptide over transformers", round(mine / yours, 2), "times")


def in_turn(
    bench: Bench, ours: Callable[[], object], theirs: Callable[[], object]
) -> tuple[float, float]:
    """Mean seconds of each, by turns, after a first turn that does not count."""
    ours(), theirs()
    found: tuple[list[float], list[float]] = ([], [])
    for _ in range(TURNS):
        for seconds, function in zip(found, (ours, theirs), strict=True):
            seconds += bench.seconds(function, least_s=1.0)
    return statistics.mean(found[0]), statistics.mean(found[1])


def padded(
    bench: Bench, sequences: list[str], most_tokens: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Sorted batches of at most so many places: tokens, attention mask and labels, [B, L] each."""
    pieces = [ESM_33.add_specials(encode_residues(each)) for each in sorted(sequences, key=len)]
    rng, batch = np.random.default_rng(1), list[np.ndarray]()
    for piece in [*pieces, None]:
        if batch and (piece is None or len(piece) * (len(batch) + 1) > most_tokens):
            rows = [torch.from_numpy(each.astype(np.int64)) for each in batch]
            tokens = torch.nn.utils.rnn.pad_sequence(
                rows, batch_first=True, padding_value=ESM_33.pad
            )
            chosen = torch.from_numpy(rng.random(tokens.shape) < 0.15) & (tokens >= FIRST_RESIDUE)
            labels = torch.where(chosen, tokens, -100)
            masked = torch.where(chosen, ESM_33.mask, tokens)
            mask = (tokens != ESM_33.pad).long()
            yield tuple(each.to(bench.device) for each in (masked, mask, labels))  # type: ignore
            batch = []
        if piece is not None:
            batch.append(piece)
