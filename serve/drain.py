"""The end of an application: nothing new is taken, what was taken is answered, then it is deleted.

`serve.delete` alone stops gateways and replicas at the same moment, and a request of many runs
would lose those that are still to be sent.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterable

from ray import serve
from ray.serve.exceptions import RayServeException

GATEWAY = "Gateway"
"""The name of the deployment that takes requests."""

KNOWN_S, LOOK_AGAIN_S = 5.0, 0.1
"""How long to wait until Serve says which gateways there are, and how often to look."""


def drain(names: Iterable[str]) -> None:
    """Drain applications side by side and delete them. Those without a gateway are just deleted."""
    names = list(names)
    asyncio.run(_drain_all(names))
    for name in names:  # the proxies stay until all is answered
        serve.delete(name)


async def _drain_all(names: list[str]) -> None:
    await asyncio.gather(*map(_drain, names))


async def _drain(name: str) -> None:
    """All gateways of one application; those that do not answer are named, and left alone."""
    handle, until = None, time.monotonic() + KNOWN_S
    told: list[object] = []
    while not told:
        try:
            handle = handle or serve.get_deployment_handle(GATEWAY, name)
            told = await handle.broadcast("drain").results_async(return_exceptions=True)
        except RayServeException as error:  # no such application, or no gateway of it is known yet
            if time.monotonic() > until:
                told = [error]
            await asyncio.sleep(LOOK_AGAIN_S)
    for each in told:
        if isinstance(each, Exception):
            print(f"{name}: a gateway was not drained ({type(each).__name__})", file=sys.stderr)
