"""Environment variables of Serve's processes: a short way from one to the next, and limits."""

from __future__ import annotations

from ray.serve.schema import ServeDeploySchema

from serve.settings import GatewaySettings

LEAST_MESSAGE_BYTES = 2**22
"""What gRPC takes unless told otherwise. Answers need it: they come in messages below 3 MB."""

HOPS = {
    # Nothing of ours blocks an event loop, so a sender needs none beside it.
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    # gRPC would take no message above 4 MB.
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(2**31 - 1),
}

PROXIES = {
    **HOPS,
    # A proxy asks a gateway by gRPC, not by calls of actors.
    "RAY_SERVE_PROXY_USE_GRPC": "1",
}
"""Of a Ray that `python -m serve` starts (docs/serving.md, "The load balancer")."""


def proxies(config: ServeDeploySchema) -> dict[str, str]:
    """Those of PROXIES, and what bounds gRPC messages by what an application may be sent (Serve's
    default is 2 GB)."""
    default = GatewaySettings().max_body_bytes
    given = [each.args.get("max_body_bytes", default) for each in config.applications]
    most = max([LEAST_MESSAGE_BYTES, *(each for each in given if isinstance(each, int))])
    return {**PROXIES, "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE": str(most)}


ACTORS = {
    **HOPS,
    # Nor does a request have to be handed to another loop to be answered.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    # Logs go to Serve's files, once.
    "RAY_SERVE_LOG_TO_STDERR": "0",
}
"""Of gateways and replicas."""
