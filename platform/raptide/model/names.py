"""Tensor names: raptide's own against Hugging Face's `EsmForMaskedLM`."""

from __future__ import annotations

import re

import torch

from raptide.model.config import ModelSettings

INV_FREQ = "inv_freq"
"""Where `normalise_hugging_face` puts the rotary frequencies, which every layer shares."""

LAYER_NAMES = {
    "attention_norm": "attention.LayerNorm",
    "attention.q_proj": "attention.self.query",
    "attention.k_proj": "attention.self.key",
    "attention.v_proj": "attention.self.value",
    "attention.out_proj": "attention.output.dense",
    "ffn_norm": "LayerNorm",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
}

OUTER_NAMES = {
    "embed.weight": "esm.embeddings.word_embeddings.weight",
    "positions.weight": "esm.embeddings.position_embeddings.weight",
    "norm_before.weight": "esm.embeddings.layer_norm.weight",
    "norm_before.bias": "esm.embeddings.layer_norm.bias",
    "norm_after.weight": "esm.encoder.emb_layer_norm_after.weight",
    "norm_after.bias": "esm.encoder.emb_layer_norm_after.bias",
    "head_dense.weight": "lm_head.dense.weight",
    "head_dense.bias": "lm_head.dense.bias",
    "head_norm.weight": "lm_head.layer_norm.weight",
    "head_norm.bias": "lm_head.layer_norm.bias",
    "head_bias": "lm_head.bias",
}


class _SameNames(dict[str, str]):
    def __missing__(self, name: str) -> str:
        return name


def native_to_hugging_face(settings: ModelSettings) -> dict[str, str]:
    """Every tensor name of `Esm` and what it is called in a bundle."""
    if settings.family == "esm1":
        return _SameNames()
    names = dict(OUTER_NAMES)
    for layer in range(settings.layers):
        for native, theirs in LAYER_NAMES.items():
            for kind in ("weight", "bias"):
                names[f"layers.{layer}.{native}.{kind}"] = (
                    f"esm.encoder.layer.{layer}.{theirs}.{kind}"
                )
    return names


def normalise_hugging_face(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One spelling for all writers: norms as weight/bias, shared tensors once, no contact head.

    transformers 5 writes norms as gamma/beta and the rotary frequencies under a literal `*`; the
    original files hold them in every layer; the tied output projection may or may not be there.
    The contact regression is no part of the language model and is left out.
    """
    clean = {}
    for name, tensor in tensors.items():
        name = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name))
        if name.endswith("rotary_embeddings.inv_freq"):
            clean[INV_FREQ] = tensor
        elif name not in ("lm_head.decoder.weight", "esm.embeddings.position_ids") and not (
            name.startswith("esm.contact_head.")
        ):
            clean[name] = tensor
    return clean
