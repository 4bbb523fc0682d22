"""Compose and deploy the application.

    serve run serve.app:build model=runs/demo
    serve run serve.app:build model=runs/demo/checkpoints/step-00000400/model replicas=2 dtype=bf16

The endpoint listens on 127.0.0.1:8000; docs at /docs. Settings: serve/settings.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray import serve

from raptide.config import parse_settings
from raptide.training.checkpoint import find_bundle
from serve.gateway import Gateway
from serve.replica import Replica
from serve.settings import ServeSettings

ONGOING_REQUESTS = 256
"""Requests a gateway or a replica works on at once; the batcher needs many to fill its batches."""


def build(arguments: dict[str, Any]) -> serve.Application:
    """The application; `arguments` are the fields of `ServeSettings`."""
    settings = parse_settings(ServeSettings, arguments, source="serve arguments")
    settings = settings.model_copy(update={"model": str(find_bundle(Path(settings.model)))})
    replica = serve.deployment(
        Replica,
        num_replicas=settings.replicas,
        max_ongoing_requests=ONGOING_REQUESTS,
        ray_actor_options={"num_cpus": 1, "num_gpus": settings.gpus_per_replica},
    ).bind(settings)
    gateway = serve.deployment(
        Gateway,
        max_ongoing_requests=ONGOING_REQUESTS,
        ray_actor_options={"num_cpus": 0},
    )
    return gateway.bind(settings, replica)
