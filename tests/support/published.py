"""Random models of fair-esm, saved the way the published files are laid out.

Written against fair-esm's own loader, which cuts the prefixes off again, and not with raptide's
name tables: it is what those are tested with.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import esm
import torch

LAYERS, WIDTH, HEADS = 3, 48, 4

SHAPE = {
    "layers": LAYERS,
    "embed_dim": WIDTH,
    "ffn_embed_dim": 4 * WIDTH,
    "attention_heads": HEADS,
}

NAMES = {
    "esm1": "esm1_t3_tiny_UR50S.pt",
    "esm1b": "esm1b_t3_tiny_UR50S.pt",
    "esm1v": "esm1v_t3_tiny_UR90S.pt",
    "esm2": "esm2_t3_tiny_UR50D.pt",
}


def random_model(kind: str) -> torch.nn.Module:
    """A model of fair-esm with random weights everywhere, biases and norms included."""
    if kind == "esm2":
        model = esm.ESM2(LAYERS, WIDTH, HEADS)
    else:
        arch = "protein_bert_base" if kind == "esm1" else "roberta_large"
        args = Namespace(
            arch=arch,
            max_positions=256,
            final_bias=True,
            token_dropout=kind != "esm1",
            emb_layer_norm_before=kind == "esm1b",
            **SHAPE,
        )
        alphabet = esm.Alphabet.from_architecture("ESM-1" if kind == "esm1" else "ESM-1b")
        model = esm.ProteinBertModel(args, alphabet)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=20 if name.endswith("regression.weight") else 0.15)
        if "norm" in name and name.endswith("weight"):
            parameter.data += 1
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq"):  # the published ones carry the rounding of fp16
            buffer.copy_(buffer.half().float())
    return model.eval()


def save_as_published(model: torch.nn.Module, kind: str, folder: Path, **options) -> Path:
    """Save model and contact head as two files; returns the model's."""
    file = folder / NAMES[kind]
    prefix = "decoder." if kind == "esm1" else "encoder.sentence_encoder."
    side = "decoder" if kind == "esm1" else "encoder"
    state, regression = {}, {}
    for name, tensor in model.state_dict().items():
        if name.startswith("contact_head"):
            regression[name] = tensor
        elif name.startswith("lm_head"):
            state[f"encoder.{name}"] = tensor
        else:
            state[prefix + name] = tensor
    values = {f"{side}_{name}": value for name, value in SHAPE.items()}
    values |= {"token_dropout": kind != "esm1", "max_positions": 256, "final_bias": True}
    if kind == "esm2":
        content = {"cfg": {"model": Namespace(**values)}}
    else:
        arch = "protein_bert_base" if kind == "esm1" else "roberta_large"
        content = {"args": Namespace(arch=arch, **values)}
    torch.save({"model": state, **content}, file, **options)
    if kind != "esm1v":
        torch.save({"model": regression}, folder / f"{file.stem}-contact-regression.pt")
    return file
