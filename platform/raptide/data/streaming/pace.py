"""Keeps Ray Data's scheduling loop at the pace of its reader.

Once as much is prepared ahead as may be, Ray Data's loop (2.60) does not wait for anything: it
asks again and again whether it may go on, and takes a whole core for as long as training lasts.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from ray.data._internal.execution.execution_callback import ExecutionCallback

Item = TypeVar("Item")

REST_S = 0.5
"""Between two steps of the loop while nobody waits for it; a step takes some milliseconds."""

_waiting = threading.Event()
"""Set while a reader of this process waits for the next item."""


class Pace(ExecutionCallback):
    """Lets the loop rest until a reader waits; for `DataContext.custom_execution_callback_classes`.

    Ray makes it without arguments, and sends its class to other processes by name.
    """

    def on_execution_step(self, executor: Any) -> None:
        _waiting.wait(REST_S)


def paced(items: Iterable[Item]) -> Iterator[Item]:
    """The same items, so that `Pace` knows when their reader waits."""
    source = iter(items)
    while True:
        _waiting.set()
        try:
            item = next(source)
        except StopIteration:
            return
        finally:
            _waiting.clear()
        yield item
