"""What the parts share: the device, shapes, rows, and the lines they write."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch

from raptide.alphabet import FIRST_RESIDUE, Alphabet, encode_residues
from raptide.data.building.synthetic import random_proteins
from raptide.data.streaming.batch import Cursor, GlobalBatch, PackedRows
from raptide.model import transformer
from raptide.model.config import ModelSettings
from raptide.model.device import takes_heads
from raptide.model.transformer import Esm

TINY = {"layers": 2, "width": 32, "heads": 4}
PRESETS = {"35M": "esm2_t12_35M", "650M": "esm2_t33_650M", "ESM-1 670M": "esm1_t34_670M"}
ROW_TOKENS = 1024


class Bench:
    """A device, and whether it is the real one or stands in for it with tiny shapes."""

    def __init__(self, device: str, limit_s: float) -> None:
        self.real = device == "cuda"
        self.device = torch.device("cuda", 0) if self.real else torch.device("cpu")
        self._until = time.monotonic() + 0.9 * limit_s
        if self.real:
            os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
            name = torch.cuda.get_device_name()
        else:
            stand_in()
            name = "CPU, dry run: figures mean nothing"
        facts = {"device": name, "torch": torch.__version__, "cuda": torch.version.cuda}
        print(json.dumps({"facts": facts}), flush=True)

    @property
    def late(self) -> bool:
        """Whether a part should come to its end."""
        return time.monotonic() > self._until

    def settings(self, size: str) -> ModelSettings:
        preset = PRESETS[size]
        shape = {"preset": preset} if self.real else {"family": preset.split("_")[0], **TINY}
        return ModelSettings.model_validate(shape)

    def synchronize(self) -> None:
        if self.real:
            torch.cuda.synchronize()

    def reset_peak(self) -> None:
        if self.real:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_gb(self) -> float:
        return torch.cuda.max_memory_allocated() / 1e9 if self.real else 0.0

    def seconds(self, function: Callable[[], object], *, least_s: float = 2.0) -> list[float]:
        """Seconds of each of at least three calls, which begin and end with an idle device."""
        least_s = least_s if self.real else 0.0
        found: list[float] = []
        while len(found) < 3 or sum(found) < least_s:
            self.synchronize()
            began = time.perf_counter()
            function()
            self.synchronize()
            found.append(time.perf_counter() - began)
            if self.late:
                break
        return found

    @contextmanager
    def counting_syncs(self) -> Iterator[Counter[str]]:
        """Within the block, calls that wait for the GPU, by the line that makes them."""
        counts: Counter[str] = Counter()
        if not self.real:
            yield counts
            return
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield counts
            finally:
                torch.cuda.set_sync_debug_mode("default")
        for warning in caught:
            if "synchroniz" in str(warning.message):
                counts[f"{os.path.basename(warning.filename)}:{warning.lineno}"] += 1


def say(case: str, what: str, value: object = "", unit: str = "", **more: object) -> None:
    """One row of the report; `more` may hold goal, verdict and note."""
    row = {"case": case, "what": what, "value": value, "unit": unit, **more}
    print(json.dumps(row), flush=True)


def say_goal(case: str, what: str, value: float, unit: str, goal: float, note: str = "") -> None:
    verdict = "met" if value >= goal else "missed"
    say(case, what, round(value, 3), unit, goal=goal, verdict=verdict, note=note)


def say_bound(case: str, what: str, value: float, bound: float, note: str = "") -> None:
    """An error that must stay below a bound, or something is wrong; NaN never does."""
    verdict = "ok" if value <= bound else "WRONG"
    say(case, what, f"{value:.2e}", goal=f"{bound:.1e}", verdict=verdict, note=note)


def stand_in() -> None:
    """Let a CPU take the branch of GPUs, and compile without a compiler."""
    import varlen_on_cpu  # noqa: F401

    def at_once(x: torch.Tensor, head_width: int) -> bool:
        return x.dtype != torch.float32 and takes_heads(head_width)

    transformer.has_varlen_attention = at_once  # type: ignore[assignment]
    torch.compile = partial(torch.compile, backend="aot_eager")  # type: ignore[assignment]


def model_on(settings: ModelSettings, device: torch.device, dtype: torch.dtype) -> Esm:
    """Random weights, drawn on the device."""
    torch.manual_seed(1)
    with device:
        model = Esm(settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif "norm" not in name:
                parameter.normal_(0.0, 0.02)
    return model.to(dtype)


def proteins(count: int, seed: int = 1, longest: int = ROW_TOKENS - 2) -> list[str]:
    """Random proteins with natural lengths, cropped."""
    return [each[:longest] for each in random_proteins(count, seed=seed)]


def packed_batch(num_rows: int, row_tokens: int, alphabet: Alphabet, seed: int) -> GlobalBatch:
    """Packed rows of natural lengths, first fit, masked as in training."""
    rng = np.random.default_rng(seed)
    tokens = np.full((num_rows, row_tokens), alphabet.pad, np.uint8)
    segments: list[list[int]] = [[] for _ in range(num_rows)]
    for residues in proteins(40 * num_rows, seed, row_tokens - 2):
        piece = alphabet.add_specials(encode_residues(residues))
        fills = [sum(row) for row in segments]
        fitting = [row for row, fill in enumerate(fills) if fill + len(piece) <= row_tokens]
        if fitting:
            row = max(fitting, key=lambda r: fills[r])
            tokens[row, fills[row] : fills[row] + len(piece)] = piece
            segments[row].append(len(piece))
    is_residue = (tokens >= FIRST_RESIDUE) & (tokens < FIRST_RESIDUE + 20)
    chosen = is_residue & (rng.random(tokens.shape) < 0.15)
    targets = np.where(chosen, tokens, alphabet.pad).astype(np.uint8)
    tokens[chosen] = alphabet.mask
    rows = PackedRows(tokens, targets, [np.array(row, np.int32) for row in segments])
    return GlobalBatch(rows, np.zeros((num_rows, 3), np.int64), Cursor()).counted()
