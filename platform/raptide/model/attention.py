"""Attention within each packed sequence: one by one, all at once, or as maps.

device.py says which of the first two a device takes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import scaled_dot_product_attention

from raptide.model.packed import Spans

Extra = tuple[torch.Tensor, torch.Tensor]
"""A learned key and value, [H, K] each."""


def attend(
    q_THK: torch.Tensor,
    k_THK: torch.Tensor,
    v_THK: torch.Tensor,
    lengths: Sequence[int],
    extra: Extra | None = None,
) -> torch.Tensor:
    """Softmax attention of every token over the tokens of its own sequence; returns [T, H, K].

    A call for each sequence, so its numbers never depend on what else is in the batch.

    Args:
        lengths: tokens of each sequence.
        extra: a key and a value behind those of every sequence (ESM-1).
    """
    pieces = zip(*(x.split(list(lengths)) for x in (q_THK, k_THK, v_THK)), strict=True)
    if extra is None:
        return torch.cat([_attend(q, k, v) for q, k, v in pieces])
    more_k, more_v = (each[None] for each in extra)
    return torch.cat(
        [_attend(q, torch.cat([k, more_k]), torch.cat([v, more_v])) for q, k, v in pieces]
    )


def attend_at_once(
    q_THK: torch.Tensor,
    k_THK: torch.Tensor,
    v_THK: torch.Tensor,
    spans: Spans,
    extra: Extra | None = None,
) -> torch.Tensor:
    """The same by one kernel over the whole batch, for GPUs in half precision.

    Args:
        spans: where the sequences lie; with `extra`, those that leave room for it.
    """
    from torch.nn.attention.varlen import varlen_attn

    if extra is not None:
        k_THK, v_THK = (
            with_extra(x_THK, each_HK, spans)
            for x_THK, each_HK in zip((k_THK, v_THK), extra, strict=True)
        )
    mixed = varlen_attn(
        *(q_THK, k_THK, v_THK), spans.cu_q, spans.cu_k, spans.longest_q, spans.longest_k
    )
    assert isinstance(mixed, torch.Tensor)
    return mixed


def with_extra(x_THK: torch.Tensor, extra_HK: torch.Tensor, spans: Spans) -> torch.Tensor:
    """Keys or values with one more behind those of every sequence, [T + B, H, K]."""
    assert spans.own_T is not None
    total = len(x_THK) + len(spans.cu_k) - 1
    room = extra_HK.expand(total, *extra_HK.shape).clone()
    return room.index_copy_(0, spans.own_T, x_THK)


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


def _attend(q_LHK: torch.Tensor, k_LHK: torch.Tensor, v_LHK: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q_LHK, k_LHK, v_LHK))
    return scaled_dot_product_attention(q, k, v)[0].transpose(0, 1)
