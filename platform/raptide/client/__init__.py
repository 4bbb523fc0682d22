"""A deployed endpoint, called as the engine is. It needs neither torch nor Ray.

In: protein sequences as strings. Out: the engine's results, computed elsewhere.
The way: client or async_client, methods, asks, pieces, runner, transport, exchange, answers.
"""

from raptide.client.async_client import AsyncClient
from raptide.client.client import Client
from raptide.client.details import Answer

__all__ = ["Answer", "AsyncClient", "Client"]
