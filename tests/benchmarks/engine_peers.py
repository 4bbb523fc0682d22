"""One embedding library in one process, driven line by line by bench_engine.py.

    python engine_peers.py NAME MODEL SEQUENCES ANSWERS

Loads the model folder MODEL, warms up, prints a line of JSON, and then answers every line on stdin
with the seconds one pass over SEQUENCES (a JSON list of strings) took. The mean embeddings of the
last pass go to ANSWERS, so that the driver can see that all peers compute the same thing.

Imports are inside the peers: each runs where only its own library is installed.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

BATCH = 8
"""Sequences in a padded batch: what fair-esm's and transformers' own examples use."""

Pass = Callable[[list[str]], "np.ndarray | None"]


def raptide(folder: str, dtype: str, *, lanes: bool = True) -> Pass:
    return load(folder, dtype, lanes).embed


def raptide_alone(folder: str, *, lanes: bool) -> Pass:
    """One protein after the other, in a process whose lanes have computed, or never do."""
    engine = load(folder, "auto", lanes)
    engine.embed(["MKTAYIAKQRQISFVKSHFSRQ" * 9] * 40)
    return lambda sequences: np.concatenate([engine.embed([each]) for each in sequences])


def load(folder: str, dtype: str, lanes: bool) -> Any:
    from raptide import Engine
    from raptide.inference.lanes import Lanes

    engine = Engine.load(folder, device="cpu", dtype=dtype)
    if not lanes:
        engine._forward.lanes = Lanes(None)
    return engine


def fair_esm(folder: str, order: str) -> Pass:
    import esm
    import torch

    from raptide.model.formats.detect import read_weights
    from raptide.model.formats.weights import name_tensors

    weights = read_weights(folder)
    shape = weights.settings
    model = esm.ESM2(shape.layers, shape.width, shape.heads).eval()
    tensors = name_tensors(weights, "fair_esm").tensors
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected, unexpected
    assert all("contact_head" in m or "inv_freq" in m or m == "lm_head.weight" for m in missing)
    convert = esm.Alphabet.from_architecture("ESM-1b").get_batch_converter()

    @torch.inference_mode()
    def embed(sequences: list[str]) -> np.ndarray:
        out = np.empty((len(sequences), shape.width), np.float32)
        for batch in _batches(sequences, order):
            _, _, tokens = convert([("", sequences[i]) for i in batch])
            hidden = model(tokens, repr_layers=[shape.layers])["representations"][shape.layers]
            for row, i in zip(hidden, batch, strict=True):
                out[i] = row[1 : 1 + len(sequences[i])].mean(0)
        return out

    return embed


def transformers(folder: str, dtype: str, order: str) -> Pass:
    import torch
    from transformers import EsmModel, EsmTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    model = EsmModel.from_pretrained(
        folder, dtype=kind, attn_implementation="sdpa", add_pooling_layer=False
    ).eval()
    tokenizer = EsmTokenizer.from_pretrained(folder)

    @torch.inference_mode()
    def embed(sequences: list[str]) -> np.ndarray:
        out = np.empty((len(sequences), model.config.hidden_size), np.float32)
        for batch in _batches(sequences, order):
            tokens = tokenizer([sequences[i] for i in batch], padding=True, return_tensors="pt")
            hidden = model(**tokens).last_hidden_state
            for row, i in zip(hidden, batch, strict=True):
                out[i] = row[1 : 1 + len(sequences[i])].float().mean(0)
        return out

    return embed


def esm_cpp(folder: str, dtype: str) -> Pass:
    import esm_cpp as library

    model = library.Model.load_from_safetensors(f"{folder}/model.safetensors")
    if dtype == "int8":
        model.quantize_weights()
    tokenizer = library.Tokenizer()

    def run(sequences: list[str]) -> None:
        """Its fastest call for sequences of unequal length; it gives logits, not embeddings."""
        ids = [np.asarray(tokenizer.encode(s, True, False), np.int32) for s in sequences]
        answers = model.forward_scheduled(ids)
        assert len(answers) == len(sequences)

    return run


def matrix_products(folder: str, dtype: str, attention: bool) -> Pass:
    """The bound: the products of all linear layers and nothing else, in the engine's batches.

    With `attention` torch's own kernel is called for every sequence and layer, too.
    """
    import torch
    from torch.nn.functional import linear, scaled_dot_product_attention

    from raptide.inference.batching import plan_batches
    from raptide.model.formats.detect import read_weights

    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    weights = read_weights(folder)
    settings = weights.settings
    layers, width, heads = settings.layers, settings.width, settings.heads
    matrices = [
        tensor.to(kind)
        for name, tensor in weights.state.items()
        if name.startswith("layers.") and tensor.ndim == 2
    ]

    @torch.inference_mode()
    def multiply(sequences: list[str]) -> None:
        lengths = [len(sequence) + 2 for sequence in sequences]
        for batch in plan_batches(lengths, 4096):
            total = sum(lengths[i] for i in batch)
            inputs = {m.shape[1]: torch.ones(total, m.shape[1], dtype=kind) for m in matrices}
            for matrix in matrices:
                linear(inputs[matrix.shape[1]], matrix)
            if not attention:
                continue
            q = torch.randn(1, heads, max(lengths), width // heads, dtype=kind)
            for _ in range(layers):
                for i in batch:
                    one = q[:, :, : lengths[i]]
                    scaled_dot_product_attention(one, one, one)

    return multiply


PEERS: dict[str, Callable[[str], Pass]] = {
    "raptide": lambda folder: raptide(folder, "auto"),
    "raptide fp32": lambda folder: raptide(folder, "fp32"),
    "raptide without lanes": lambda folder: raptide(folder, "auto", lanes=False),
    "raptide one by one": lambda folder: raptide_alone(folder, lanes=True),
    "raptide one by one without lanes": lambda folder: raptide_alone(folder, lanes=False),
    "matrix products bf16": lambda folder: matrix_products(folder, "bf16", False),
    "matrix products fp32": lambda folder: matrix_products(folder, "fp32", False),
    "products and attention bf16": lambda folder: matrix_products(folder, "bf16", True),
    "transformers bf16 sorted": lambda folder: transformers(folder, "bf16", "sorted"),
    "transformers fp32 sorted": lambda folder: transformers(folder, "fp32", "sorted"),
    "fair-esm sorted": lambda folder: fair_esm(folder, "sorted"),
    "fair-esm file order": lambda folder: fair_esm(folder, "file"),
    "esm-cpp fp32": lambda folder: esm_cpp(folder, "fp32"),
    "esm-cpp int8": lambda folder: esm_cpp(folder, "int8"),
}


def _batches(sequences: list[str], order: str) -> list[list[int]]:
    indices = list(range(len(sequences)))
    if order == "sorted":
        indices.sort(key=lambda i: len(sequences[i]))
    return [indices[i : i + BATCH] for i in range(0, len(indices), BATCH)]


def memory_mb(field: str) -> float:
    """Resident memory of this process from Linux: "VmRSS" now, "VmHWM" at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith(field))


def measure_memory(folder: str, sequences: list[str]) -> dict[str, float]:
    """Megabytes that a model adds to a process in which a tiny one has run: code is not counted."""
    from raptide import Engine
    from raptide.model.formats.detect import read_weights

    Engine.load(f"{folder}-tiny", device="cpu", dtype="bf16").embed(["MKTAYIAKQR"])
    before = memory_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    engine = Engine.load(folder, device="cpu", dtype="bf16")
    arrays = engine.embed(sequences, pooling="residue")
    grown = memory_mb("VmHWM") - before
    weights = sum(t.numel() * t.element_size() for t in read_weights(folder).state.values())
    output = sum(array.nbytes for array in arrays)
    return {"grown_mb": grown, "weights_mb": weights / 1e6, "output_mb": output / 1e6}


def main() -> None:
    name, folder, sequences_file, answers_file = sys.argv[1:]
    sequences = json.loads(Path(sequences_file).read_text())
    if name == "memory":
        print(json.dumps(measure_memory(folder, sequences)))
        return
    run = PEERS[name](folder)
    run(sequences[:BATCH])
    print(json.dumps({"ready": name}), flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        answers = run(sequences)
        seconds = time.perf_counter() - started
        if answers is not None:
            np.save(answers_file, answers)
        print(json.dumps({"seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
