"""gRPC's own health and reflection, as probes and tools ask."""

import grpc
import pytest
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from serve.rpc import health


@pytest.fixture
def check(client, proxy):
    with grpc.insecure_channel(proxy.grpc) as channel:
        ask = channel.unary_unary(
            f"/{health.SERVICE}/Check",
            health.HealthCheckRequest.SerializeToString,
            health.HealthCheckResponse.FromString,
        )
        metadata = [("application", "raptide")]
        yield lambda service: ask(
            health.HealthCheckRequest(service=service), metadata=metadata, timeout=60
        )


@pytest.mark.parametrize("service", ["", "raptide"])
def test_an_endpoint_that_is_ready_says_so_to_probes_without_a_key(check, service):
    assert check(service).status == health.SERVING


def test_a_service_that_is_not_there_is_not_found(check):
    with pytest.raises(grpc.RpcError) as caught:
        check("other")
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    assert "serves 'raptide'" in caught.value.details()


def test_tools_can_ask_what_there_is(client, proxy):
    with grpc.insecure_channel(proxy.grpc) as channel:
        known = ProtoReflectionDescriptorDatabase(channel)
        assert {health.SERVICE, "raptide.v1.Raptide"} <= set(known.get_services())
        file = known.FindFileContainingSymbol("raptide.v1.Raptide")
        assert "Embed" in [method.name for method in file.service[0].method]
        assert known.FindFileContainingSymbol(health.SERVICE).service[0].method[0].name == "Check"
