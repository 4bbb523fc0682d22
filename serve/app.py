"""Compose and deploy the application.

    serve run serve.app:build model=runs/demo
    serve run serve.app:build model=runs/demo/checkpoints/step-00000400 replicas=2 dtype=bf16
    serve run serve/config.yaml

The endpoint listens on 127.0.0.1:8000; docs at /docs. Settings: serve/settings.py. How to secure,
scale, update and watch it: docs/serving.md.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.config import (
    AutoscalingConfig,
    AutoscalingPolicy,
    RequestRouterConfig,
)
from ray.serve.schema import LoggingConfig

from raptide.config import parse_settings
from raptide.model.formats.detect import read_weights
from raptide.storage import is_uri
from raptide.training.checkpoints.checkpoint import find_bundle, find_bundle_at, run_of
from serve.environment import ACTORS
from serve.gateway.deployment import Gateway
from serve.gateway.routing import TokenRouter
from serve.models import keep, open_model
from serve.replica.deployment import Replica
from serve.scaling import TokenScaling
from serve.settings import ModelSettings, ServedModel, ServeSettings

ONGOING_REQUESTS = 1024
"""Requests a gateway or a replica works on at once. The batcher needs many to fill its batches;
what limits them is their tokens."""

QUEUED_REQUESTS = 4096
"""Requests that wait at a gateway while there is no replica, or all have their hands full."""

GATEWAY_CHECK_S = 1
"""How often Serve asks a gateway whether it lives: for so long a dead one may go unnoticed."""

LOGS = LoggingConfig(encoding="JSON", enable_access_log=False)
"""One line of JSON a request, written by the gateway (serve/gateway/guard.py)."""

SURGE_PERCENT = 25
"""Replicas, of all, that an update starts before it stops as many old ones; at least one."""

FINISH_S = 10.0
"""Beyond the longest request that is allowed, until what is being stopped ends in any case."""

LINGER_S = 10.0
"""How long a replica that is being stopped stays at least, and how often it looks whether it has
nothing more to do. Between two runs of one request it may have nothing for a moment, and were it
gone then, so were the version of the weights that the request is answered by."""

GATEWAY_BYTES = 2**28
"""What a gateway needs besides the answers it holds; docs/serving.md has what it took."""

METRICS_INTERVAL_S = 1.0
"""How often replicas report their tokens to the autoscaler (Serve's default is 10)."""


def build(arguments: dict[str, Any]) -> serve.Application:
    """The application; `arguments` are the fields of `ServeSettings`.

    Raises:
        ConfigError, BundleError: a setting is wrong, or there is no such model.
    """
    return compose(parse_settings(ServeSettings, arguments, source="serve arguments"))


def compose(settings: ServeSettings, replica: type = Replica) -> serve.Application:
    """The application; `replica` is the class that answers."""
    models = [_kept(model, settings.staging) for model in settings.model_settings()]
    finish_s = max(60.0, settings.timeout_s + FINISH_S)
    handles = {model.name: _replicas(model, replica, finish_s) for model in models}
    gateway = serve.deployment(
        Gateway,
        num_replicas=settings.gateways,
        max_ongoing_requests=ONGOING_REQUESTS,
        ray_actor_options={
            "num_cpus": 0,
            "memory": GATEWAY_BYTES + settings.max_held_bytes,
            "runtime_env": {"env_vars": ACTORS},
        },
        health_check_period_s=GATEWAY_CHECK_S,
        health_check_timeout_s=15,
        graceful_shutdown_timeout_s=finish_s,
        max_surge_percent=100,
        max_constructor_retry_count=3,
        logging_config=LOGS,
    )
    # The paths stay out of its arguments, so that a new checkpoint replaces replicas alone.
    known = [model.model_copy(update={"path": "", "digest": ""}) for model in models]
    return gateway.bind(settings.gateway_settings(), known, handles)


def _kept(model: ModelSettings, staging: str | None) -> ServedModel:
    """A model put where nothing prunes it, after every tensor has been found in its place."""
    found = find_bundle_at(model.path) if is_uri(model.path) else str(find_bundle(Path(model.path)))
    run = None
    if not is_uri(found):
        read_weights(found)
        run = run_of(Path(found))
    kept = keep(model, found, run, staging)
    if is_uri(found):
        read_weights(open_model(kept))
    return kept


def _replicas(model: ModelSettings, replica: type, finish_s: float) -> serve.Application:
    """The deployment of one model.

    An update starts new replicas before it stops old ones (surge); a constructor that raises, as it
    does for a model that does not answer as its bundle says, leaves the old ones serving.
    """
    scale: dict[str, Any] = {"num_replicas": model.replicas}
    if model.max_replicas is not None:
        scale = {"autoscaling_config": _autoscaling(model, model.max_replicas)}
    # No more threads than cores: those of one pass spin while they wait for each other.
    threads = str(max(1, math.floor(model.cpus_per_replica)))
    environment = {**ACTORS, "OMP_NUM_THREADS": threads}
    return serve.deployment(
        replica,
        name=f"replica-{model.name}",
        max_ongoing_requests=ONGOING_REQUESTS,
        max_queued_requests=QUEUED_REQUESTS,
        ray_actor_options={
            "num_cpus": model.cpus_per_replica,
            "num_gpus": model.gpus_per_replica,
            "runtime_env": {"env_vars": environment},
        },
        request_router_config=RequestRouterConfig(request_router_class=TokenRouter),
        health_check_period_s=5,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=finish_s,
        graceful_shutdown_wait_loop_s=LINGER_S,
        max_surge_percent=SURGE_PERCENT,
        max_constructor_retry_count=3,
        logging_config=LOGS,
        **scale,
    ).bind(model)


def _autoscaling(model: ModelSettings, max_replicas: int) -> AutoscalingConfig:
    policy = AutoscalingPolicy(
        policy_function=TokenScaling,
        policy_kwargs={"target_tokens": model.target_tokens_per_replica},
    )
    return AutoscalingConfig(
        min_replicas=model.min_replicas,
        initial_replicas=max(1, model.min_replicas),
        max_replicas=max_replicas,
        upscale_delay_s=model.upscale_delay_s,
        downscale_delay_s=model.downscale_delay_s,
        metrics_interval_s=METRICS_INTERVAL_S,
        look_back_period_s=2 * METRICS_INTERVAL_S,
        policy=policy,
    )
