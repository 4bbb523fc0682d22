"""Tensor names: raptide's own, Hugging Face's `EsmForMaskedLM` and fair-esm's, side by side.

fair-esm's are those that remain when its prefixes (`encoder.sentence_encoder.`, `encoder.`,
`decoder.`) are cut off.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from raptide.model.families import make_model
from raptide.model.shapes import AnyShape

COLUMNS = ("native", "hugging_face", "fair_esm")


@dataclass(frozen=True)
class Named:
    """A model as one format spells it: what readers of files make, and what writers take."""

    settings: AnyShape

    tensors: Mapping[str, torch.Tensor]

    column: str
    """Whose names the tensors have, one of COLUMNS."""

    source: Path | None = None
    """The file they come from, for errors."""

    lineage: Mapping[str, Any] = field(default_factory=dict)
    """Where the weights come from; plain JSON values."""

    left_out: tuple[str, ...] = ()
    """Tensors of the file that are no part of the language model, such as a classifier's."""


LAYER_NAMES = [
    ("attention_norm", "attention.LayerNorm", "self_attn_layer_norm"),
    ("attention.q_proj", "attention.self.query", "self_attn.q_proj"),
    ("attention.k_proj", "attention.self.key", "self_attn.k_proj"),
    ("attention.v_proj", "attention.self.value", "self_attn.v_proj"),
    ("attention.out_proj", "attention.output.dense", "self_attn.out_proj"),
    ("ffn_norm", "LayerNorm", "final_layer_norm"),
    ("fc1", "intermediate.dense", "fc1"),
    ("fc2", "output.dense", "fc2"),
]
"""Each has a weight and a bias, in every layer."""

ESM1_LAYER_NAMES = [
    ("attention.bias_k", "", "self_attn.bias_k"),
    ("attention.bias_v", "", "self_attn.bias_v"),
]

OUTER_MODULES = [
    ("norm_before", "esm.embeddings.layer_norm", "emb_layer_norm_before"),
    ("norm_after", "esm.encoder.emb_layer_norm_after", "emb_layer_norm_after"),
    ("head_dense", "lm_head.dense", "lm_head.dense"),
    ("head_norm", "lm_head.layer_norm", "lm_head.layer_norm"),
]
"""Each has a weight and a bias."""

OUTER_TENSORS = [
    ("embed.weight", "esm.embeddings.word_embeddings.weight", "embed_tokens.weight"),
    ("positions.weight", "esm.embeddings.position_embeddings.weight", "embed_positions.weight"),
    ("head_bias", "lm_head.bias", "lm_head.bias"),
]

ESM1_HEAD_NAMES = [
    ("head_weight", "", "embed_out"),
    ("head_bias", "", "embed_out_bias"),
]

TIED_HEAD = {"hugging_face": "lm_head.decoder.weight", "fair_esm": "lm_head.weight"}
"""The output projection, which is the embedding matrix once more and may be left out."""

CONTACT_HEAD = {
    "native": "contact_head.regression",
    "hugging_face": "esm.contact_head.regression",
    "fair_esm": "contact_head.regression",
}

INV_FREQ = {
    "hugging_face": "esm.encoder.layer.{layer}.attention.self.rotary_embeddings.inv_freq",
    "fair_esm": "layers.{layer}.self_attn.rot_emb.inv_freq",
}

LAYER_PREFIX = {"native": "layers.", "hugging_face": "esm.encoder.layer.", "fair_esm": "layers."}


def tensor_names(settings: AnyShape, column: str) -> dict[str, str]:
    """Every tensor name of a model and what it is called in one of the COLUMNS."""
    if settings.family == "lstm":  # whose names are our own alone
        with torch.device("meta"):
            return {name: name for name in make_model(settings).state_dict()}
    which = COLUMNS.index(column)
    prefix = LAYER_PREFIX[column]
    esm1 = settings.family == "esm1"
    names = {row[0]: row[which] for row in OUTER_TENSORS + (ESM1_HEAD_NAMES if esm1 else [])}
    for row in OUTER_MODULES:
        for kind in ("weight", "bias"):
            names[f"{row[0]}.{kind}"] = f"{row[which]}.{kind}"
    for layer in range(settings.layers):
        for row in LAYER_NAMES:
            for kind in ("weight", "bias"):
                names[f"layers.{layer}.{row[0]}.{kind}"] = f"{prefix}{layer}.{row[which]}.{kind}"
        for row in ESM1_LAYER_NAMES:
            names[f"layers.{layer}.{row[0]}"] = f"{prefix}{layer}.{row[which]}"
    return names
