"""A deployed endpoint, called as the engine is. It needs neither torch nor Ray.

In: protein sequences as strings. Out: the engine's results, computed elsewhere.
The way: client, chunks, transport, answers.
"""

from raptide.client.client import Client

__all__ = ["Client"]
