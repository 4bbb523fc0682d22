"""How a worker's process is set before it computes; what is CUDA's is not exercised by tests."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from raptide.heap import trim_heap

GARBAGE_STEPS = 20
"""Steps between two collections of Python's garbage."""


def prepare_process(device: str, precision: str, *, compiles: bool) -> None:
    """Set what DeepSpeed, torch and CUDA read; call it before any of them starts.

    Args:
        device: "cpu" or "cuda".
        precision: of the recipe; products in fp32 are exact where it says fp32, elsewhere the few
            that are left may be rounded to TF32's 10 bits.
        compiles: whether layers are compiled.
    """
    os.environ["DS_ACCELERATOR"] = device
    if not compiles:  # else importing DeepSpeed loads all of Inductor
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
    if device == "cuda":
        # Batches differ in size, and pieces of a fixed one would soon not fit each other.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        if precision != "fp32":
            torch.set_float32_matmul_precision("high")


@contextmanager
def garbage_by_hand() -> Iterator[None]:
    """Within the block Python collects no garbage by itself: each worker would at another moment,
    and all wait for the slowest. `collect_garbage` does in fixed steps."""
    gc.collect()
    gc.freeze()  # what is there stays
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def collect_garbage(step: int) -> None:
    """If it is due in this step, Python's and the C library's.

    All generations of Python's, which are small since what was there at first is frozen: what lives
    through a collection of the younger ones alone would never be looked at again.
    """
    if step % GARBAGE_STEPS == 0:
        gc.collect()
    trim_heap(step)
