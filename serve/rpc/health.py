"""grpc.health.v1.Health, as https://github.com/grpc/grpc-proto has it: what probes of gRPC ask.

Serve's proxy sends it to the gateway as any other method (serve/gateway/health.py). Only `Check` is
served; clients take a server without `Watch` for one that is healthy.
"""

from __future__ import annotations

from typing import Any

import grpc
from google.protobuf import descriptor_pool
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.internal import builder

SERVICE = "grpc.health.v1.Health"
SERVING, NOT_SERVING = 1, 2


def _describe() -> bytes:
    """The file that protoc would make of health.proto."""
    file = FileDescriptorProto(
        name="grpc/health/v1/health.proto", package="grpc.health.v1", syntax="proto3"
    )
    request = file.message_type.add(name="HealthCheckRequest")
    request.field.add(name="service", number=1, type="TYPE_STRING", label="LABEL_OPTIONAL")
    response = file.message_type.add(name="HealthCheckResponse")
    response.field.add(
        name="status",
        number=1,
        type="TYPE_ENUM",
        label="LABEL_OPTIONAL",
        type_name=".grpc.health.v1.HealthCheckResponse.ServingStatus",
    )
    status = response.enum_type.add(name="ServingStatus")
    for number, name in enumerate(("UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN")):
        status.value.add(name=name, number=number)
    check = file.service.add(name="Health").method.add(name="Check")
    check.input_type = ".grpc.health.v1.HealthCheckRequest"
    check.output_type = ".grpc.health.v1.HealthCheckResponse"
    return file.SerializeToString()


DESCRIPTOR = descriptor_pool.Default().AddSerializedFile(_describe())
builder.BuildMessageAndEnumDescriptors(DESCRIPTOR, globals())
builder.BuildTopDescriptorsAndMessages(DESCRIPTOR, __name__, globals())
HealthCheckRequest: Any = globals()["HealthCheckRequest"]
HealthCheckResponse: Any = globals()["HealthCheckResponse"]


def add_HealthServicer_to_server(servicer: Any, server: Any) -> None:
    """For `grpc_servicer_functions` of Serve's gRPC options."""
    handlers = {
        "Check": grpc.unary_unary_rpc_method_handler(
            servicer.Check,
            request_deserializer=HealthCheckRequest.FromString,
            response_serializer=HealthCheckResponse.SerializeToString,
        )
    }
    handler = grpc.method_handlers_generic_handler(SERVICE, handlers)
    server.add_generic_rpc_handlers((handler,))
    server.add_registered_method_handlers(SERVICE, handlers)
