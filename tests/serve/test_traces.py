"""One request, followed from the proxy to the replica: by its spans and its lines in the log."""

import json
import sys
import time
from pathlib import Path

import pytest
import ray
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from serve.tracing import exporter

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
RUN = "replica-raptide run"


@pytest.fixture
def logs():
    return Path(ray._private.worker._global_node.get_session_dir_path()) / "logs/serve"


def read_all(stream):
    """JSON objects, one after the other; the last one may be half written."""
    decoder, found, rest = json.JSONDecoder(), [], stream.strip()
    while rest:
        try:
            one, end = decoder.raw_decode(rest)
        except ValueError:
            break
        found.append(one)
        rest = rest[end:].lstrip()
    return found


def wait_for(find, seconds=30.0):
    until = time.monotonic() + seconds
    while not (found := find()):
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.2)
    return found


def test_spans_lead_from_the_gateway_to_the_replica_with_the_requests_id(client, logs):
    headers = {"traceparent": f"00-{TRACE}-{CALLER}-01", "X-Request-Id": "traced-1"}
    body = {"input": "MKTAYIAKQR"}
    assert client.post("/v1/embeddings", json=body, headers=headers).status_code == 200

    def spans():
        files = (logs / "spans").glob("*")
        found = [span for file in files for span in read_all(file.read_text())]
        ours = [span for span in found if span["context"]["trace_id"] == f"0x{TRACE}"]
        names = {span["name"] for span in ours}
        return ours if {"POST /v1/embeddings", "replica_handle_request " + RUN} <= names else None

    ours = {span["context"]["span_id"]: span for span in wait_for(spans)}
    way = [span for span in ours.values() if span["name"] == "replica_handle_request " + RUN]
    while way[-1]["parent_id"] in ours:
        way.append(ours[way[-1]["parent_id"]])
    assert [way[1]["name"], way[-1]["name"]] == [f"route_to_replica {RUN}", "POST /v1/embeddings"]
    assert way[-1]["parent_id"] == f"0x{CALLER}"
    assert [span["attributes"]["request_id"] for span in way[:2]] == ["traced-1", "traced-1"]
    assert "MKTAYIAKQR" not in json.dumps(list(ours.values()))


def test_what_is_not_asked_for_is_not_traced(client, logs):
    def count():
        return sum(file.stat().st_size for file in (logs / "spans").glob("*"))

    before = count()
    for _ in range(5):
        client.post("/v1/embeddings", json={"input": "MKTAYIAKQR"})
    assert count() == before


def test_gateway_and_replica_write_down_a_request_under_its_id(client, logs):
    for body in ({"input": ["MKTAYIAKQR"] * 2}, {"input": "MK", "layers": [99]}):
        client.post("/v1/embeddings", json=body, headers={"X-Request-Id": "followed-1"})

    def lines():
        found = []
        for file in logs.glob("replica_raptide_*.log"):
            for line in file.read_text().splitlines():
                if "followed-1" in line:
                    found.append(json.loads(line))
        return found if len(found) == 4 else None

    told = wait_for(lines)
    assert {line["request_id"] for line in told} == {"followed-1"}
    by_place = {line["deployment"]: [] for line in told}
    for line in told:
        by_place[line["deployment"]].append(line)
    assert {line["status"] for line in by_place["raptide_Gateway"]} == {200, 422}
    done, refused = by_place["raptide_replica-raptide"]
    assert (done["tokens"], "queue_s" in done, refused["refused"]) == (24, True, "layers")


def test_spans_go_to_the_collector_that_is_named(monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    (processor,) = exporter()
    assert isinstance(processor, BatchSpanProcessor)
    processor.shutdown()
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace.export", None)
    assert exporter() == []
