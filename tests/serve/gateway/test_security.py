"""An endpoint with keys and two models, over HTTP."""

import contextlib
import re
import time
from pathlib import Path

import grpc
import numpy as np
import pytest
import ray

from serve.rpc import raptide_pb2 as pb
from serve.rpc.raptide_pb2_grpc import RaptideStub

SECRET = "WWHHWWHHCCMMWW"
"""A sequence that occurs nowhere else, to look for in logs."""


def wait_until(holds, seconds=30.0):
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, "it did not come to hold"
        time.sleep(0.2)


def embed(client, **body):
    return client.post("/v1/embeddings", json={"input": "MKTAYIAKQR", **body})


def test_a_valid_key_is_asked_for(keyed):
    with keyed.client() as nobody, keyed.client("rpt_wrong") as wrong, keyed.client("lab") as lab:
        for client in (nobody, wrong):
            answer = embed(client)
            assert answer.status_code == 401
            assert answer.headers["WWW-Authenticate"] == "Bearer"
            assert answer.json()["error"]["type"] == "authentication"
            assert client.get("/v1/models").status_code == 401
            assert client.get("/v1/unknown").status_code == 401
        assert embed(lab).status_code == 200
        basic = lab.post("/v1/embeddings", json={"input": "MK"}, headers={"Authorization": "x"})
        assert basic.status_code == 401


def test_health_and_documentation_take_no_key_and_the_document_asks_for_one(keyed):
    with keyed.client() as nobody:
        for path in ("/healthz", "/readyz", "/docs"):
            assert nobody.get(path).status_code == 200
        document = nobody.get("/openapi.json").json()
        assert document["paths"]["/v1/scores"]["post"]["security"] == [{"key": []}]
        assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"


def test_a_key_is_revoked_and_added_without_a_restart(keyed):
    with keyed.client("guest") as guest, keyed.client("lab") as lab:
        assert embed(guest).status_code == 200
        keyed.write("lab", "slow")
        wait_until(lambda: embed(guest).status_code == 401, 5)
        assert embed(lab).status_code == 200
        keyed.write("lab", "slow", "guest")
        wait_until(lambda: embed(guest).status_code == 200, 5)


def test_a_key_has_its_residues_per_minute(keyed):
    with keyed.client("slow") as slow, keyed.client("lab") as lab:
        dear = embed(slow, input=["A" * 350] * 2)
        assert dear.status_code == 422
        assert "costs 700 residues" in dear.json()["error"]["message"]
        assert embed(slow, input="A" * 590).status_code == 200
        assert embed(slow, input="A" * 350).status_code == 200, (
            "a request may overdraw what is left"
        )
        answer = embed(slow)
        assert answer.status_code == 429
        assert answer.json()["error"]["type"] == "rate_limit"
        assert 1 <= int(answer.headers["Retry-After"]) <= 61
        assert embed(lab).status_code == 200


def test_named_web_pages_are_let_in(keyed):
    headers = {"Origin": "https://lab.example", "Access-Control-Request-Method": "POST"}
    with keyed.client("lab") as lab:
        answer = embed(lab)
        assert "Access-Control-Allow-Origin" not in answer.headers
        answer = lab.post("/v1/embeddings", json={"input": "MK"}, headers=headers)
        assert answer.headers["Access-Control-Allow-Origin"] == "https://lab.example"
        other = {**headers, "Origin": "https://else.example"}
        answer = lab.post("/v1/embeddings", json={"input": "MK"}, headers=other)
        assert "Access-Control-Allow-Origin" not in answer.headers


def test_a_browser_asks_whether_it_may_before_it_shows_its_key(keyed):
    """A preflight carries no key; browsers send none."""
    headers = {
        "Origin": "https://lab.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    with keyed.client() as browser:
        answer = browser.options("/v1/embeddings", headers=headers)
        assert answer.status_code == 200
        assert answer.headers["Access-Control-Allow-Origin"] == "https://lab.example"
        allowed = answer.headers["Access-Control-Allow-Headers"].lower()
        assert "authorization" in allowed
        answer = browser.options(
            "/v1/embeddings", headers={**headers, "Origin": "https://else.example"}
        )
        assert "Access-Control-Allow-Origin" not in answer.headers
        assert browser.post("/v1/embeddings", json={"input": "MK"}).status_code == 401


def test_each_model_answers_by_its_name_and_an_idle_one_starts_when_asked(keyed):
    with keyed.client("lab") as lab:
        base, tuned = embed(lab), embed(lab, model="tuned")
        assert (base.status_code, tuned.status_code) == (200, 200)
        assert base.headers["X-Raptide-Model"] == "base"
        assert (base.headers["X-Raptide-Step"], tuned.headers["X-Raptide-Step"]) == ("5", "9")
        assert base.headers["X-Raptide-Weights"] != tuned.headers["X-Raptide-Weights"]
        vectors = [np.array(a.json()["data"][0]["embedding"]) for a in (base, tuned)]
        assert not np.allclose(*vectors, atol=0.1)
        assert [model["id"] for model in lab.get("/v1/models").json()["data"]] == ["base", "tuned"]
        assert embed(lab, model="other").status_code == 404


@pytest.fixture
def logs():
    """Everything that Ray and Serve have logged in this session."""
    folder = Path(ray._private.worker._global_node.get_session_dir_path()) / "logs"

    def read():
        return "\n".join(
            file.read_text(errors="replace") for file in folder.rglob("*") if file.is_file()
        )

    return read


def _send_secrets_by_grpc(proxy, keyed):
    """One request that is answered, and some of each kind that are not."""
    requests = [
        ("Embed", pb.EmbedRequest(sequences=[SECRET]), {}),
        ("Embed", pb.EmbedRequest(sequences=[SECRET]), {"authorization": f"Bearer {SECRET}"}),
        ("Embed", pb.EmbedRequest(sequences=[SECRET + "1"]), {}),
        ("Embed", pb.EmbedRequest(sequences=["M"], pooling=SECRET), {}),
        ("Logits", pb.LogitsRequest(sequences=[SECRET], model="tuned"), {}),
        ("Scan", pb.ScanRequest(sequence=SECRET, model=SECRET), {}),
        ("Score", pb.ScoreRequest(sequences=[SECRET], variants=[SECRET]), {}),
        ("Score", pb.ScoreRequest(sequences=[SECRET]), {"x-raptide-timeout-s": SECRET}),
        ("Score", pb.ScoreRequest(sequences=[SECRET * 30]), {"x-raptide-timeout-s": "0.001"}),
    ]
    lab = {"application": "keyed", "authorization": f"Bearer {keyed.keys['lab']}"}
    with grpc.insecure_channel(proxy.grpc) as channel:
        for index, (method, request, more) in enumerate(requests):
            metadata = list((lab | more).items())
            with contextlib.nullcontext() if index == 0 else pytest.raises(grpc.RpcError):
                found = getattr(RaptideStub(channel), method)(
                    request, metadata=metadata, timeout=60
                )
                list(found)


def test_no_log_holds_a_sequence_or_a_key(keyed, proxy, logs):
    with keyed.client("lab") as lab:
        good = lab.post(
            "/v1/embeddings", json={"input": SECRET}, headers={"X-Request-Id": "find-me-1"}
        )
        assert good.status_code == 200
        refused = [
            ("embeddings", {"input": SECRET + "1"}),
            ("embeddings", {"input": SECRET, "layers": [99]}),
            ("embeddings", {"input": [[SECRET]]}),
            ("embeddings", {"inputs": SECRET}),
            ("scores", {"sequence": SECRET, "variants": [SECRET]}),
            ("scores", {"sequences": [SECRET], "method": SECRET}),
            ("scan", {"sequence": SECRET, "model": SECRET}),
        ]
        for call, body in refused:
            assert 400 <= lab.post(f"/v1/{call}", json=body).status_code < 500
        broken = lab.post("/v1/scores", content=f'{{"sequences": "{SECRET}', timeout=30)
        assert broken.status_code == 422
        sent = [
            (
                "scores",
                {"sequence": SECRET, "variants": ["W1A"], "method": "masked-marginals"},
                200,
            ),
            ("scores", {"sequence": SECRET, "variants": [SECRET], "method": "pseudo-ppl"}, 422),
            ("scan", {"sequence": SECRET, "model": "tuned"}, 422),
        ]
        for call, body, status in sent:
            assert lab.post(f"/v1/{call}", json=body).status_code == status
        late = {"X-Raptide-Timeout-S": "0.001"}
        body = {"sequences": [SECRET * 30]}
        assert lab.post("/v1/scores", json=body, headers=late).status_code == 504
    _send_secrets_by_grpc(proxy, keyed)
    wait_until(
        lambda: logs().count("find-me-1") >= 2 and logs().count('"protocol": "grpc"') >= 8, 10
    )
    written = logs()
    assert SECRET not in written
    assert not any(key in written for key in keyed.keys.values())
    ours = [line for line in written.splitlines() if "find-me-1" in line and '"call"' in line]
    assert any('"tokens": 16' in line for line in ours), "the replica's line has the id, too"
    line = next(line for line in ours if '"residues"' in line)
    grpc_lines = [line for line in written.splitlines() if '"protocol": "grpc"' in line]
    statuses = {int(re.search(r'"status": (\d+)', line)[1]) for line in grpc_lines}
    assert {200, 401, 404, 422, 504} <= statuses
    for part in ('"residues": 14', '"key": "lab"', '"status": 200', '"model": "base"'):
        assert re.search(part, line), line
