"""The gRPC methods by themselves: what they look at first, how they split, what they write down."""

import asyncio
import logging
from types import SimpleNamespace

import fake_replicas
import grpc
import numpy as np
import pytest

from serve.calls import Refused
from serve.gateway.keys import KeyRing, make_key
from serve.gateway.rpc import RpcMethods
from serve.rpc import raptide_pb2 as pb
from serve.rpc.joining import join_arrays
from serve.rpc.service import add_service

SECRET = "WWHHWWHHCCMMWW"


class Context:
    """What Serve hands to a method."""

    def __init__(self, **metadata):
        self.metadata = [(name.replace("_", "-"), value) for name, value in metadata.items()]
        self.code = self.details = None
        self.trailing = {}

    def invocation_metadata(self):
        return self.metadata

    def set_code(self, code):
        self.code = code

    def set_details(self, details):
        self.details = details

    def set_trailing_metadata(self, pairs):
        self.trailing = dict(pairs)


def make_methods(replicas, keys=None, **settings):
    methods = RpcMethods()
    methods._service = fake_replicas.make_service(replicas, **settings)
    methods._keys = keys or KeyRing(None)
    return methods


def call(methods, name, request, **metadata):
    """The messages of an answer, and its context."""
    context = Context(**metadata)

    async def run():
        found = getattr(methods, name)(request, context)
        return [each async for each in found] if hasattr(found, "__anext__") else [await found]

    return asyncio.run(run()), context


def counted(methods, metric):
    return dict(methods._service.metrics[metric].seen)


def test_the_key_is_looked_at_before_anything_is_parsed(tmp_path):
    key, line = make_key("lab")
    keys = fake_replicas.keys_file(tmp_path, line)
    methods = make_methods(fake_replicas.FakeReplicas(), keys)
    for name in ("Embed", "Logits", "Contacts", "Scan", "Score", "ListModels"):
        _, context = call(methods, name, b"\xff is no message", authorization="Bearer no")
        assert context.code is grpc.StatusCode.UNAUTHENTICATED
        _, context = call(methods, name, b"\xff is no message", authorization=f"Bearer {key}")
        assert context.code is grpc.StatusCode.INVALID_ARGUMENT
        assert "The message is no " in context.details
    given = pb.EmbedRequest(sequences=["MK"])
    for request in (given, given.SerializeToString()):  # as the generated servicer parses it, too
        parts, context = call(methods, "Embed", request, authorization=f"Bearer {key}")
        assert (len(parts), context.code) == (1, None)


def test_serves_proxies_are_given_methods_that_parse_nothing():
    registered = {}
    server = SimpleNamespace(
        add_generic_rpc_handlers=lambda handlers: registered.update(handlers[0]._method_handlers),
        add_registered_method_handlers=lambda name, handlers: None,
    )
    add_service(fake_replicas.FakeReplicas.__new__(type("Any", (), {"__getattr__": str})), server)
    streams = {name.rsplit("/", 1)[1]: each.response_streaming for name, each in registered.items()}
    assert streams == {
        "Embed": True,
        "Logits": True,
        "Contacts": True,
        "Scan": True,
        "Score": False,
        "ListModels": False,
    }
    assert all(each.request_deserializer is None for each in registered.values())


def test_a_message_above_what_a_body_may_hold_is_refused():
    methods = make_methods(fake_replicas.FakeReplicas(), max_body_bytes=2000)
    request = pb.EmbedRequest(sequences=["M" * 3000])
    for given in (request, request.SerializeToString()):
        _, context = call(methods, "Embed", given)
        assert context.code is grpc.StatusCode.INVALID_ARGUMENT
        assert "at most 2,000 bytes" in context.details


def test_no_message_is_above_three_megabytes_and_the_parts_of_an_array_are_joined():
    replicas = fake_replicas.FakeReplicas(width=1280)
    methods = make_methods(replicas)
    sequences = ["A" * 1000, "A" * 3, "A" * 2000, "A" * 580]
    request = pb.EmbedRequest(sequences=sequences, pooling="residue")
    parts, context = call(methods, "Embed", request)
    assert context.code is None
    assert max(part.ByteSize() for part in parts) <= 3_000_000
    assert len(parts) > 6
    arrays = list(join_arrays(parts))
    assert [array.shape for array in arrays] == [(len(each), 1280) for each in sequences]
    for sequence, array in zip(sequences, arrays, strict=True):
        work = SimpleNamespace(ask=replicas.works[0].ask, sequences=[sequence], variants=[])
        np.testing.assert_array_equal(array, replicas.answer(work).arrays[0])
    broken = [part for part in parts if not any(array.offset for array in part.arrays)]
    with pytest.raises(ValueError, match=r"in the middle|goes on"):
        list(join_arrays(broken))


def test_what_fits_into_one_message_is_as_it_always_was():
    methods = make_methods(fake_replicas.FakeReplicas())
    (part,), _ = call(methods, "Embed", pb.EmbedRequest(sequences=["MK", "MKT"], pooling="residue"))
    assert [(array.index, array.shape, array.offset) for array in part.arrays] == [
        (0, [2, 32], 0),
        (1, [3, 32], 0),
    ]


@pytest.mark.parametrize("given", ["nan", "-1", "0", "-inf", "", "soon", "1e-400"])
def test_a_timeout_that_is_none_is_refused(given):
    replicas = fake_replicas.FakeReplicas()
    methods = make_methods(replicas)
    for name, request in (
        ("Embed", pb.EmbedRequest(sequences=["MK"])),
        ("Score", pb.ScoreRequest(sequences=["MK"])),
    ):
        _, context = call(methods, name, request, x_raptide_timeout_s=given)
        assert context.code is grpc.StatusCode.INVALID_ARGUMENT
        assert f"above 0, but {given!r} was given" in context.details
    assert not replicas.works


@pytest.mark.parametrize("given", ["inf", "1e300", "5"])
def test_no_timeout_is_longer_than_the_endpoints(given):
    replicas = fake_replicas.FakeReplicas()
    methods = make_methods(replicas, timeout_s=7.0)
    _, context = call(
        methods, "Embed", pb.EmbedRequest(sequences=["MK"]), x_raptide_timeout_s=given
    )
    assert context.code is None
    assert replicas.works[0].timeout_s <= min(float(given), 7.0)


def test_layers_are_those_of_http():
    methods = make_methods(fake_replicas.FakeReplicas(layers=4))
    for layers in ([-1] * 30_000, [4, -1], range(257)):
        request = pb.EmbedRequest(sequences=["MK"], layers=layers)
        _, context = call(methods, "Embed", request)
        assert context.code is grpc.StatusCode.INVALID_ARGUMENT
        assert "names each layer once" in context.details


def test_an_answer_that_would_be_too_large_is_refused():
    methods = make_methods(fake_replicas.FakeReplicas(width=1280), max_answer_bytes=100_000)
    request = pb.EmbedRequest(sequences=["A" * 100], pooling="residue")
    _, context = call(methods, "Embed", request)
    assert context.code is grpc.StatusCode.INVALID_ARGUMENT
    assert "more than the 100,000 that are sent" in context.details


def test_every_outcome_is_counted_as_over_http(tmp_path):
    key, line = make_key("lab")
    replicas = fake_replicas.FakeReplicas()
    methods = make_methods(replicas, fake_replicas.keys_file(tmp_path, line))
    lab = {"authorization": f"Bearer {key}"}
    embed, score = pb.EmbedRequest(sequences=["MKT"]), pb.ScoreRequest(sequences=["MK"] * 2)
    call(methods, "Embed", embed, **lab)
    call(methods, "Score", score, **lab)
    call(methods, "ListModels", pb.ListModelsRequest(), **lab)
    call(methods, "Embed", embed, authorization="Bearer no")
    call(methods, "Score", pb.ScoreRequest(sequences=["M1"]), **lab)
    call(methods, "Scan", pb.ScanRequest(sequence="MK", model="other"), **lab)
    replicas.failure = Refused("full", retry_after_s=3)
    _, full = call(methods, "Embed", embed, **lab)
    assert (full.code, full.trailing) == (grpc.StatusCode.RESOURCE_EXHAUSTED, {"retry-after": "3"})
    replicas.failure = ZeroDivisionError(SECRET)
    _, failed = call(methods, "Score", score, **lab)
    assert failed.code is grpc.StatusCode.INTERNAL
    assert counted(methods, "requests") == {
        ("m", "embeddings", "200"): 1,
        ("m", "scores", "200"): 1,
        ("", "models", "200"): 1,
        ("", "embeddings", "401"): 1,
        ("", "scores", "422"): 1,
        ("", "scan", "404"): 1,
        ("m", "embeddings", "429"): 1,
        ("m", "scores", "500"): 1,
    }
    assert counted(methods, "errors") == {
        ("authentication",): 1,
        ("invalid_request",): 2,
        ("overloaded",): 1,
        ("internal",): 1,
    }
    assert counted(methods, "residues") == {("m", "embeddings"): 6, ("m", "scores"): 8}
    assert set(counted(methods, "request")) == {tags[:2] for tags in counted(methods, "requests")}
    assert methods._service._ledger.held_bytes == 0


def test_a_stream_that_breaks_or_is_left_is_no_success():
    replicas = fake_replicas.FakeReplicas(failure=Refused("deadline"), fails_at=3)
    methods = make_methods(replicas)
    long = pb.EmbedRequest(sequences=["M" * 4000] * 5, pooling="residue")
    parts, context = call(methods, "Embed", long)
    assert (len(parts), context.code) == (4, grpc.StatusCode.DEADLINE_EXCEEDED)
    assert parts[-1] == pb.Arrays()  # it carries the status through Serve

    async def leave():
        stream = methods.Embed(long, Context())
        await anext(stream)
        await stream.aclose()

    replicas.failure = None
    asyncio.run(leave())
    assert counted(methods, "requests") == {
        ("m", "embeddings", "504"): 1,
        ("m", "embeddings", "499"): 1,
    }
    assert counted(methods, "errors") == {("deadline",): 1, ("disconnected",): 1}
    assert methods._service._ledger.held_bytes == 0


class Kept(logging.Handler):
    def __init__(self):
        super().__init__()
        self.records = []

    def emit(self, record):
        self.records.append(record)


@pytest.fixture
def kept():
    """What the gateway writes into its log."""
    logger, handler = logging.getLogger("ray.serve"), Kept()
    before = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield handler.records
    logger.removeHandler(handler)
    logger.setLevel(before)


def test_each_request_gets_one_line_which_holds_nothing_of_what_was_sent(kept, monkeypatch):
    replicas = fake_replicas.FakeReplicas()
    methods = make_methods(replicas)
    call(methods, "Embed", pb.EmbedRequest(sequences=[SECRET]))
    call(methods, "Embed", pb.EmbedRequest(sequences=[SECRET + "1"]))
    call(methods, "Embed", pb.EmbedRequest(sequences=["M"], pooling=SECRET))
    call(methods, "Scan", pb.ScanRequest(sequence="M", model=SECRET))
    call(
        methods, "Score", pb.ScoreRequest(sequences=["MK"], variants=[SECRET], method="pseudo-ppl")
    )
    call(methods, "Score", pb.ScoreRequest(sequences=["MK"]), x_raptide_timeout_s=SECRET)
    replicas.failure = ZeroDivisionError(SECRET)
    call(methods, "Embed", pb.EmbedRequest(sequences=[SECRET]))
    monkeypatch.setattr(methods._service, "query", lambda *_, **__: 1 / 0)
    call(methods, "Embed", pb.EmbedRequest(sequences=[SECRET]))
    lines = [record for record in kept if hasattr(record, "call")]
    assert [(line.call, line.status, line.protocol) for line in lines] == [
        ("embeddings", 200, "grpc"),
        ("embeddings", 422, "grpc"),
        ("embeddings", 422, "grpc"),
        ("scan", 404, "grpc"),
        ("scores", 422, "grpc"),
        ("scores", 422, "grpc"),
        ("embeddings", 500, "grpc"),
        ("embeddings", 500, "grpc"),
    ]
    written = " ".join(f"{record.getMessage()} {record.__dict__}" for record in kept)
    assert SECRET not in written
    assert "test_rpc_alone.py:" in written, "where the last one failed"
