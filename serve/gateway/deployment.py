"""The gateway: takes requests over HTTP and gRPC, and asks replicas. Needs no GPU."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from raptide.errors import ConfigError
from serve.gateway.api import build_api
from serve.gateway.health import HealthMethods
from serve.gateway.keys import KeyRing
from serve.gateway.rpc import RpcMethods
from serve.gateway.service import Service
from serve.settings import GatewaySettings, ModelSettings


@serve.ingress()
class Gateway(RpcMethods, HealthMethods):
    """One process that takes requests.

    Raises:
        ConfigError: Serve listens beyond this machine, and no keys are set.
    """

    def __init__(
        self,
        settings: GatewaySettings,
        models: list[ModelSettings],
        handles: dict[str, DeploymentHandle],
    ) -> None:
        self._keys = KeyRing(Path(settings.keys_file) if settings.keys_file else None)
        if not self._keys:
            check_ports(*_ports())
        self._keys.watch()
        self._service = Service(settings, models, handles)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return build_api(self._service, self._keys)


def check_ports(http_host: str | None, haproxy: bool, grpc: bool) -> None:
    """Without keys, Serve may listen on the loopback only.

    Raises:
        ConfigError: it listens elsewhere, as gRPC and HAProxy always do.
    """
    open_to = None
    if haproxy:
        open_to = "HAProxy listens on every interface"
    elif grpc:
        open_to = "gRPC listens on every interface"
    elif http_host and not _is_loopback(http_host):
        open_to = f"http_options.host is {http_host}"
    if open_to:
        raise ConfigError(
            f"Off the loopback API keys are needed, but {open_to} and none are set; make one with "
            "`python -m serve.keys NAME` and name the file in `keys_file`."
        )


def _ports() -> tuple[str | None, bool, bool]:
    """Where Serve listens: its HTTP host, whether through HAProxy, whether for gRPC."""
    controller = serve.context._get_global_client()._controller
    http, grpc = ray.get([controller.get_http_config.remote(), controller.get_grpc_config.remote()])
    haproxy = os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1"
    return http.host, haproxy, bool(grpc.grpc_servicer_functions)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
