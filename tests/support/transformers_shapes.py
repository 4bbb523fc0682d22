"""Shapes of transformers' ESM models."""

from __future__ import annotations

from typing import Any

from transformers import EsmConfig


def esm_config(
    *, rotary: bool, layers: int, width: int, positions: int, **options: Any
) -> EsmConfig:
    """ESM-2 (rotary) or ESM-1b, as published but for its size; four heads."""
    return EsmConfig(
        vocab_size=33,
        mask_token_id=32,
        pad_token_id=1,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=positions + 2,
        position_embedding_type="rotary" if rotary else "absolute",
        token_dropout=True,
        emb_layer_norm_before=not rotary,
        layer_norm_eps=1e-5,
        **{"intermediate_size": 4 * width, **options},
    )
