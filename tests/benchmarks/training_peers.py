"""One peer of bench_training.py: trains until it is stopped; each step is a line of JSON.

python training_peers.py PEER CORPUS PRESET ROWS BATCHES
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch
from transformers import EsmConfig, EsmForMaskedLM

from raptide.alphabet import ESM_33, FIRST_RESIDUE
from raptide.data.corpus import Corpus
from raptide.data.streaming.batch import StreamSettings
from raptide.data.streaming.stream import Source, StreamPlan, prepare_rows
from raptide.model.config import ModelSettings
from raptide.model.transformer import Esm
from raptide.training.batches import micro_batches

ROW_TOKENS = 1024
CROP = ROW_TOKENS - 2
CPU = torch.device("cpu")

Step = Callable[[], int]
"""Trains one step; returns its unpadded tokens."""


def main() -> None:
    peer, path, preset, rows, count = sys.argv[1:]
    corpus = Corpus.open(Path(path))
    settings = ModelSettings.model_validate({"preset": preset})
    if peer == "bare loop":
        step = bare_loop(corpus, settings, int(rows))
    else:
        by_length = peer.endswith("sorted")
        step = transformers_loop(corpus, settings, int(rows), int(count), by_length=by_length)
    ended = time.perf_counter()
    while True:
        tokens = step()
        began, ended = ended, time.perf_counter()
        seconds = ended - began
        line = {"speed/step_s": seconds, "speed/tokens_per_s": tokens / seconds}
        print(json.dumps(line), flush=True)


def adam(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4)


def bare_loop(corpus: Corpus, settings: ModelSettings, rows: int) -> Step:
    """raptide's model and rows in a plain PyTorch loop: no Ray, no DeepSpeed."""
    plan = StreamPlan(
        (Source(str(corpus.path), corpus.digest),),
        StreamSettings(row_tokens=ROW_TOKENS, batch_rows=rows),
        "esm-33",
    )
    packed = prepare_rows(plan, 0, 0)
    starts = cycle(range(0, len(packed.tokens) - rows, rows))
    model = Esm(settings).initialise(1)
    optimizer = adam(model)

    def step() -> int:
        start = next(starts)
        (micro,) = micro_batches(packed, [(start, start + rows)], ESM_33, CPU)
        model(micro.packed, micro.targets).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return sum(micro.packed.lengths)

    return step


def transformers_loop(
    corpus: Corpus, settings: ModelSettings, rows: int, count: int, *, by_length: bool
) -> Step:
    """EsmForMaskedLM on `count` padded batches of about as many tokens as `rows` packed rows.

    They lie evenly in all that there are, since the speed of a batch depends on its lengths.
    """
    sequences = list(islice(residues(corpus), 4096))
    each = round(rows * ROW_TOKENS / np.mean([len(sequence) + 2 for sequence in sequences]))
    if by_length:
        sequences.sort(key=len)
    batches = [sequences[i : i + each] for i in range(0, len(sequences) - each, each)]
    evenly = (np.arange(count) + 0.5) * len(batches) / count
    queue = cycle([batches[int(place)] for place in evenly])
    config = EsmConfig(
        vocab_size=33,
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
    model = EsmForMaskedLM(config)
    optimizer = adam(model)

    def step() -> int:
        tokens, attention, labels = padded(next(queue))
        model(input_ids=tokens, attention_mask=attention, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return int(attention.sum())

    return step


def residues(corpus: Corpus) -> Iterator[np.ndarray]:
    """Residue ids of the training sequences in corpus order, which is random, cropped."""
    for row in corpus.blocks("train"):
        block = corpus.read_block(row)
        for start, end in zip(block.residue_splits[:-1], block.residue_splits[1:], strict=True):
            yield block.residues[start : min(end, start + CROP)]


def padded(batch: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, attention mask and labels, [B, longest + 2] each; 15% are asked for."""
    width = max(map(len, batch)) + 2
    tokens = torch.full((len(batch), width), ESM_33.pad)
    for row, sequence in zip(tokens, batch, strict=True):
        row[: len(sequence) + 2] = torch.from_numpy(ESM_33.add_specials(sequence).astype(np.int64))
    attention = (tokens != ESM_33.pad).long()
    residue = (tokens >= FIRST_RESIDUE) & (tokens < FIRST_RESIDUE + 27)
    asked = (torch.rand(tokens.shape) < 0.15) & residue
    labels = torch.where(asked, tokens, -100)
    return torch.where(asked, ESM_33.mask, tokens), attention, labels


if __name__ == "__main__":
    main()
