"""A thread fetches a worker's rows, cuts them and sends them to the device ahead of their steps."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from raptide.data.streaming.shares import BatchShare
from raptide.training.batches import Share

Cut = Callable[[BatchShare], Share]
"""A worker's share of a batch as micro-batches on its device."""

POLL_S = 0.5
"""Seconds after which a thread with a share in its hands looks whether anyone still wants it."""


class SharesAhead:
    """A worker's shares of the batches of an iterator, one of them always on its way.

    On a GPU they go over a stream of their own, beside the step before.
    """

    def __init__(self, batches: Iterator[BatchShare], cut: Cut, device: torch.device) -> None:
        self._ready: queue.Queue[Any] = queue.Queue(maxsize=1)
        self._closed = threading.Event()
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.last_wait_s = 0.0
        """Seconds spent waiting for the share at hand."""
        thread = threading.Thread(target=self._run, args=(batches, cut), name="ahead", daemon=True)
        thread.start()

    def __iter__(self) -> Iterator[Share]:
        """The shares in order; what goes wrong with one is raised in its place."""
        while True:
            started = time.perf_counter()
            share, sent = self._ready.get()
            self.last_wait_s = time.perf_counter() - started
            if share is None:
                return
            if isinstance(share, BaseException):
                raise share
            if sent is not None:  # not exercised without a GPU
                self._take_over(share, sent)
            yield share

    def close(self) -> None:
        """No more is wanted; the thread ends once it has what it is waiting for."""
        self._closed.set()

    def _run(self, batches: Iterator[BatchShare], cut: Cut) -> None:
        try:
            for batch in batches:
                if not self._hand_over(*self._send(batch, cut)):
                    return
            self._hand_over(None, None)
        except BaseException as error:
            self._hand_over(error, None)

    def _send(self, batch: BatchShare, cut: Cut) -> tuple[Share, Any]:
        """The share, and on a GPU the event that it has arrived."""
        if self._stream is None:
            return cut(batch), None
        with torch.cuda.stream(self._stream):  # not exercised without a GPU
            share = cut(batch)
            return share, self._stream.record_event()

    def _hand_over(self, share: Any, sent: Any) -> bool:
        """Whether there was still someone to take it."""
        while not self._closed.is_set():
            try:
                self._ready.put((share, sent), timeout=POLL_S)
            except queue.Full:
                continue
            return True
        return False

    def _take_over(self, share: Share, sent: Any) -> None:
        """The step's stream waits for the share, and its memory for the step."""
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(sent)
        for micro in share.micro:
            for tensor in micro.tensors:
                tensor.record_stream(stream)
