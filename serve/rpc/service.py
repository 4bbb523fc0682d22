"""The gRPC service for Serve's proxies: `grpc_servicer_functions: [serve.rpc.service.add_service]`.

`raptide_pb2_grpc.add_RaptideServicer_to_server` would do, too, but has a proxy parse what anybody
sends; here requests stay bytes until the gateway has checked their key.
"""

from __future__ import annotations

from typing import Any

import grpc

from serve.rpc.raptide_pb2 import DESCRIPTOR


def add_service(servicer: Any, server: Any) -> None:
    """Register the methods of `servicer`, which get bytes."""
    service = DESCRIPTOR.services_by_name["Raptide"]
    handlers = {}
    for method in service.methods:
        answers = getattr(servicer, method.name)
        if method.server_streaming:
            handlers[method.name] = grpc.unary_stream_rpc_method_handler(answers)
        else:
            handlers[method.name] = grpc.unary_unary_rpc_method_handler(answers)
    generic = grpc.method_handlers_generic_handler(service.full_name, handlers)
    server.add_generic_rpc_handlers((generic,))
    server.add_registered_method_handlers(service.full_name, handlers)
