"""What nodes are tried with: matrix products, and tensors summed over several of them.

gloo where there are no GPUs, NCCL where there are; the latter was not exercised yet.
"""

from __future__ import annotations

import datetime
import os
import socket
import statistics
import time

import ray
import torch
import torch.distributed as dist

GROUP_S = 120.0
"""Seconds that a group of processes may take to meet and to answer."""

ROUNDS = 5


class Exerciser:
    """One process on one node, with one GPU if the node has any."""

    def __init__(self, threads: int) -> None:
        """
        Args:
            threads: for products on CPUs.
        """
        self._device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
        torch.set_num_threads(threads)

    def product(self, seconds: float) -> float:
        """10^12 operations a second in matrix products, over `seconds`.

        Their mean: a node that stands still in between is slow, however fast it runs otherwise.
        """
        on_gpu = self._device.type == "cuda"
        size, dtype = (8192, torch.bfloat16) if on_gpu else (1024, torch.float32)
        left, right = (torch.randn(size, size, dtype=dtype, device=self._device) for _ in range(2))
        self._timed_product(left, right)
        times: list[float] = []
        while sum(times) < seconds or len(times) < 3:
            times.append(self._timed_product(left, right))
        return 2 * size**3 / statistics.mean(times) / 1e12

    def _timed_product(self, left: torch.Tensor, right: torch.Tensor) -> float:
        started = time.perf_counter()
        torch.mm(left, right)
        self._wait()
        return time.perf_counter() - started

    def meeting_point(self) -> str:
        """Where a group of which this process is the first can meet."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    def all_reduce(self, place: str, rank: int, size: int, megabytes: int) -> float:
        """GB/s at which a tensor is summed over a group of processes, by the median of rounds.

        Args:
            place: `meeting_point` of the first.
            rank: of this process among `size`.
        """
        os.environ.setdefault("NCCL_ASYNC_ERROR_HANDLING", "1")
        dist.init_process_group(
            "nccl" if self._device.type == "cuda" else "gloo",
            init_method=f"tcp://{place}",
            rank=rank,
            world_size=size,
            timeout=datetime.timedelta(seconds=GROUP_S),
        )
        try:
            tensor = torch.ones(megabytes * 250_000, device=self._device)
            dist.all_reduce(tensor)
            self._wait()
            times = []
            for _ in range(ROUNDS):
                started = time.perf_counter()
                dist.all_reduce(tensor)
                self._wait()
                times.append(time.perf_counter() - started)
            return megabytes / 1000 / statistics.median(times)
        finally:
            dist.destroy_process_group()

    def _wait(self) -> None:
        if self._device.type == "cuda":  # not exercised without a GPU
            torch.cuda.synchronize(self._device)
