"""Whether a node is leaving the cluster: what ends on it then ends for that reason."""

from __future__ import annotations

import asyncio
import logging

import ray
from ray._private.state import state

logger = logging.getLogger("ray.serve")


async def is_leaving(node: str) -> bool:
    """Whether a node is being drained, or is gone; False where Ray does not say."""
    return await asyncio.to_thread(_is_leaving, node)


def _is_leaving(node: str) -> bool:
    try:
        alive = {each["NodeID"] for each in ray.nodes() if each["Alive"]}
        return node not in alive or node in state.get_draining_nodes()
    except Exception as error:
        logger.warning("Ray does not say which nodes leave (%s).", type(error).__name__)
        return False
