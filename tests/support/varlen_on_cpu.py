"""Torch's attention over all sequences at once, for CPUs: what GPUs run, where there is none.

Importing it gives the operator that `torch.nn.attention.varlen` calls a kernel for the CPU,
sequence by sequence, that asks of its inputs what the GPU's asks. So the layers' branch for GPUs
can be run, differentiated and compiled as it is.
"""

import torch
from torch.nn.attention import varlen


def _check(query, key, value, cu_q, cu_k, max_q, max_k):
    heads, width = query.shape[1:]
    assert query.dtype == key.dtype == value.dtype
    assert key.shape == value.shape == (int(cu_k[-1]), heads, width)
    assert len(query) == int(cu_q[-1])
    assert width % 8 == 0
    assert width <= 256
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert len(cu_q) == len(cu_k)
    assert int(cu_q[0]) == int(cu_k[0]) == 0
    assert int(cu_q.diff().max()) <= max_q
    assert int(cu_k.diff().max()) <= max_k
    assert all(x.stride(-1) == 1 for x in (query, key, value))


def _pieces(query, key, value, cu_q, cu_k):
    q, k, v = (
        x.transpose(0, 1).split(cu.diff().tolist(), 1)
        for x, cu in ((query, cu_q), (key, cu_k), (value, cu_k))
    )
    return zip(q, k, v, strict=True)


def _attend(query, key, value, cu_q, cu_k):
    out, lse = [], []
    for q, k, v in _pieces(query, key, value, cu_q, cu_k):
        scores = q.float() @ k.float().mT * q.shape[-1] ** -0.5
        out.append((scores.softmax(-1) @ v.float()).to(q.dtype))
        lse.append(scores.logsumexp(-1))
    return torch.cat(out, 1).transpose(0, 1).contiguous(), torch.cat(lse, 1)


@varlen._varlen_attn.register_kernel("cpu")
def _forward(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, scale=None, *_ignored
):
    _check(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)
    assert not is_causal
    assert scale is None
    out, lse = _attend(query, key, value, cu_seq_q, cu_seq_k)
    return out, lse, torch.zeros(2, dtype=torch.uint64)


@varlen._varlen_attn_backward.register_kernel("cpu")
def _backward(grad_out, query, key, value, out, lse, cu_seq_q, cu_seq_k, max_q, max_k, *_ignored):
    _check(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)
    assert grad_out.stride(-1) == 1
    scale, gradients = query.shape[-1] ** -0.5, []
    grads = grad_out.transpose(0, 1).split(cu_seq_q.diff().tolist(), 1)
    pieces = _pieces(query, key, value, cu_seq_q, cu_seq_k)
    for grad, piece in zip(grads, pieces, strict=True):
        grad, q, k, v = (x.float() for x in (grad, *piece))
        p = (q @ k.mT * scale).softmax(-1)
        grad_p = grad @ v.mT
        grad_scores = p * (grad_p - (p * grad_p).sum(-1, keepdim=True)) * scale
        gradients.append((grad_scores @ k, grad_scores.mT @ q, p.mT @ grad))
    return tuple(
        torch.cat(parts, 1).transpose(0, 1).to(query.dtype).contiguous()
        for parts in zip(*gradients, strict=True)
    )
