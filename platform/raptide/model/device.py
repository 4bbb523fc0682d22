"""Everything that is chosen by device, in one place.

The tests need no GPU: the branch that is chosen for CUDA is run with a kernel for CPUs, compiled
and traced; CUDA itself is exercised by `make test-gpu` alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch


def multiplies_bf16_faster(device: torch.device) -> bool:
    """Whether bf16 matrix products are faster than fp32 ones (about twice, where they are)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def threads_for(parameters: int) -> int:
    """Threads that products of a model's size keep busy on CPUs: 1 below 100 M, 8 for 650 M."""
    return 2 ** min(4, max(0, (parameters // 100_000_000).bit_length()))


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the CPU's on a device, without waiting for what that still has to do.

    A GPU takes it from pinned memory, which torch keeps until the copy is done.
    """
    if device.type == "cuda" and not tensor.is_cuda:  # not exercised without a GPU
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


WIDEST_HEAD, HEAD_STEP = 256, 8
"""Values of a head that the kernel over all sequences takes: at most, and a multiple of."""


def takes_heads(head_width: int) -> bool:
    """Whether one kernel can attend within all sequences of a batch with such heads."""
    return head_width % HEAD_STEP == 0 and head_width <= WIDEST_HEAD


def has_varlen_attention(x_TD: torch.Tensor, head_width: int) -> bool:
    """Whether one kernel attends within all sequences of a batch at once: flash attention."""
    return x_TD.is_cuda and x_TD.dtype != torch.float32 and takes_heads(head_width)


def compilation_pays(device: torch.device) -> bool:
    """Whether fusing what surrounds the matrix products saves time: on CPUs it cost some."""
    return device.type == "cuda"


CPU_SIZES = (512, 256, 128, 64, 16)
"""Tokens that go through a layer at once on CPUs."""

ROUND_UP_BELOW = 128


def first_sizes(device: torch.device, max_tokens: int) -> list[int]:
    """Sizes of batches, in tokens, smallest first, of which the first takes longer than the next.

    For a GPU's layers are compiled, and memory for a full batch is set aside; on CPUs oneDNN
    generates code by the number of rows.
    """
    sizes = CPU_SIZES if device.type == "cpu" else (CPU_SIZES[-1], max_tokens)
    return sorted(size for size in sizes if size <= max_tokens)


def token_chunks(x_TD: torch.Tensor) -> Iterator[tuple[int, int, int]]:
    """Cut T tokens for functions that treat each by itself: start, stop, and size to pad to.

    Where gradients are kept, and on GPUs, which want large products, all go at once. For inference
    on CPUs they go in pieces of CPU_SIZES: 512 tokens stay in the cache and need little memory;
    and oneDNN keeps 0.7 MB of generated code for each matrix product in bf16 whose number of rows
    it has not seen (up to 1,024 of them), so there must be few. Less than 64 rows are computed for
    nothing.
    """
    total = len(x_TD)
    if total == 0 or x_TD.is_cuda or not torch.is_inference_mode_enabled():
        yield 0, total, total
        return
    start = 0
    while start < total:
        left = total - start
        if left < ROUND_UP_BELOW:
            size = min(size for size in CPU_SIZES if size >= left)
        else:
            size = max(size for size in CPU_SIZES if size <= left)
        yield start, min(start + size, total), size
        start += size
