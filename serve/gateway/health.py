"""Health over gRPC; the same as /readyz, without a key."""

from __future__ import annotations

from typing import Any

import grpc
from ray.serve.grpc_util import RayServegRPCContext

from serve.gateway.service import Service
from serve.rpc import health


class HealthMethods:
    """The methods of grpc.health.v1.Health (serve/rpc/health.py)."""

    _service: Service

    async def Check(self, request: Any, grpc_context: RayServegRPCContext) -> Any:
        """Whether the endpoint serves, or the model that `service` names."""
        states = await self._service.standing.readiness()
        name = request.service
        if name and name not in states:
            message = f"This endpoint serves {', '.join(map(repr, states))}."
            grpc_context.set_code(grpc.StatusCode.NOT_FOUND)
            grpc_context.set_details(message)
            raise LookupError(message)
        serves = states[name] == "ready" if name else self._service.standing.serves(states)
        status = health.SERVING if serves else health.NOT_SERVING
        return health.HealthCheckResponse(status=status)
