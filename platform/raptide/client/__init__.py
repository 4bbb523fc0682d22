"""A deployed endpoint, called as the engine is. Needs neither torch nor Ray."""

from raptide.client.client import Client

__all__ = ["Client"]
