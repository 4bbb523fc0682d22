"""Attention within each packed sequence: one function, the backend chosen by device."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from raptide.model.device import has_varlen_attention
from raptide.model.packed import Packed


def attend(
    q_THK: torch.Tensor, k_THK: torch.Tensor, v_THK: torch.Tensor, packed: Packed
) -> torch.Tensor:
    """Softmax attention of every token over the tokens of its own sequence; returns [T, H, K].

    On GPUs in half precision this is one kernel over the whole batch; elsewhere it is a call per
    sequence, so a sequence's numbers never depend on what else is in the batch.
    """
    if has_varlen_attention(q_THK):  # not exercised without a GPU
        from torch.nn.attention.varlen import varlen_attn

        cu, longest = packed.cu_seqlens, packed.longest
        mixed = varlen_attn(q_THK, k_THK, v_THK, cu, cu, longest, longest)
        assert isinstance(mixed, torch.Tensor)
        return mixed
    return _attend_one_by_one(q_THK, k_THK, v_THK, packed)


def attend_with_bias(
    q_THK: torch.Tensor,
    k_THK: torch.Tensor,
    v_THK: torch.Tensor,
    packed: Packed,
    bias_k_HK: torch.Tensor,
    bias_v_HK: torch.Tensor,
) -> torch.Tensor:
    """As `attend`, with one learned key and value behind every sequence (ESM-1)."""
    pieces = zip(*(x.split(packed.lengths) for x in (q_THK, k_THK, v_THK)), strict=True)
    return torch.cat(
        [
            _attend(q, torch.cat([k, bias_k_HK[None]]), torch.cat([v, bias_v_HK[None]]))
            for q, k, v in pieces
        ]
    )


def attention_maps(
    q_THK: torch.Tensor, k_THK: torch.Tensor, bias_k_HK: torch.Tensor | None
) -> torch.Tensor:
    """The softmax itself, for one sequence, [H, T, T] fp32; slow, and square in memory.

    ESM-1's learned key takes its part of the softmax and is left out of the result.
    """
    q_HTK = q_THK.transpose(0, 1).float() * q_THK.shape[-1] ** -0.5
    k_HTK = k_THK.transpose(0, 1).float()
    if bias_k_HK is not None:
        k_HTK = torch.cat([k_HTK, bias_k_HK[:, None].float()], dim=1)
    return torch.softmax(q_HTK @ k_HTK.mT, dim=-1)[:, :, : len(q_THK)]


def _attend_one_by_one(
    q_THK: torch.Tensor, k_THK: torch.Tensor, v_THK: torch.Tensor, packed: Packed
) -> torch.Tensor:
    pieces = zip(*(x.split(packed.lengths) for x in (q_THK, k_THK, v_THK)), strict=True)
    return torch.cat([_attend(q, k, v) for q, k, v in pieces])


def _attend(q_LHK: torch.Tensor, k_LHK: torch.Tensor, v_LHK: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q_LHK, k_LHK, v_LHK))
    return scaled_dot_product_attention(q, k, v)[0].transpose(0, 1)
