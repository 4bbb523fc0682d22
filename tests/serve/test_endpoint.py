"""The deployed application over HTTP, against the engine."""

import asyncio
import base64
import re
import select
import socket
import time

import httpx
import numpy as np
import openai
import pyarrow as pa
import pytest
import yaml
from conftest import ROOT
from ray.serve.schema import ServeDeploySchema

from raptide.client.client import Client
from raptide.errors import BundleError, ConfigError
from serve.app import build

SEQUENCES = ["MKTAYIAKQR", "GSHMLEDPVAFYW", "M", "LAGVSERTIDPKQNFYMHWC" * 10]
VARIANTS = ["K2A", "K2A:Q9E", "M1W"]
ARROW = {"Accept": "application/vnd.apache.arrow.stream"}


def arrays(answer, field):
    """Arrays of a base64 answer."""
    assert answer.status_code == 200, answer.text
    return [
        np.frombuffer(base64.b64decode(row[field]), "<f4").reshape(row["shape"])
        for row in answer.json()["data"]
    ]


def scores(answer):
    assert answer.status_code == 200, answer.text
    return [row["score"] for row in answer.json()["data"]]


def key_of(client):
    return client.headers["Authorization"].removeprefix("Bearer ")


async def ask_all(client, path, bodies, **headers):
    keyed = {"Authorization": client.headers["Authorization"], **headers}
    async with httpx.AsyncClient(base_url=client.base_url, timeout=60.0, headers=keyed) as many:
        return await asyncio.gather(*(many.post(path, json=body) for body in bodies))


def test_embeddings_are_the_engines(client, engine):
    answer = client.post("/v1/embeddings", json={"input": SEQUENCES}).json()
    vectors = np.array([row["embedding"] for row in answer["data"]])
    np.testing.assert_allclose(vectors, engine.embed(SEQUENCES), atol=1e-5)
    assert [row["index"] for row in answer["data"]] == [0, 1, 2, 3]
    assert answer["usage"]["prompt_tokens"] == sum(map(len, SEQUENCES))


@pytest.mark.parametrize("pooling", ["mean", "bos", "residue"])
@pytest.mark.parametrize("layers", [[-1], [1], [0, -1]])
def test_pooling_and_layers_are_the_engines(client, engine, pooling, layers):
    body = {"input": SEQUENCES, "pooling": pooling, "layers": layers, "encoding_format": "base64"}
    found = arrays(client.post("/v1/embeddings", json=body), "embedding")
    for ours, theirs in zip(found, engine.embed(SEQUENCES, layers, pooling), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("encoding_format", ["float", "base64"])
def test_the_openai_client_works_unchanged(client, engine, encoding_format):
    theirs = openai.OpenAI(base_url=f"{client.base_url}/v1", api_key=key_of(client), max_retries=0)
    with theirs:
        for given in (SEQUENCES, SEQUENCES[0]):
            answer = theirs.embeddings.create(
                model="raptide", input=given, encoding_format=encoding_format
            )
            listed = [given] if isinstance(given, str) else given
            if encoding_format == "float":
                vectors = np.array([row.embedding for row in answer.data])
            else:
                raw = [base64.b64decode(row.embedding) for row in answer.data]
                vectors = np.array([np.frombuffer(each, "<f4") for each in raw])
            np.testing.assert_allclose(vectors, engine.embed(listed), atol=1e-5)
            assert answer.usage.prompt_tokens == sum(map(len, listed))
        plain = theirs.embeddings.create(model="raptide", input=SEQUENCES)  # base64, read for us
        vectors = np.array([row.embedding for row in plain.data])
        np.testing.assert_allclose(vectors, engine.embed(SEQUENCES), atol=1e-5)
        assert [model.id for model in theirs.models.list()] == ["raptide"]
        with pytest.raises(openai.UnprocessableEntityError, match="position 2 holds '1'"):
            theirs.embeddings.create(model="raptide", input="M1K")


@pytest.mark.parametrize("method", ["pseudo-ppl", "one-pass"])
def test_scores_of_sequences_are_the_engines(client, engine, method):
    answer = client.post("/v1/scores", json={"sequences": SEQUENCES, "method": method})
    np.testing.assert_allclose(scores(answer), engine.score_sequences(SEQUENCES, method), atol=1e-5)
    first = answer.json()["data"][0]
    assert first["perplexity"] == pytest.approx(np.exp(-first["score"]))


@pytest.mark.parametrize("method", ["wt-marginals", "masked-marginals", "pseudo-ppl"])
def test_scores_of_variants_are_the_engines(client, engine, method):
    body = {"sequence": SEQUENCES[0], "variants": VARIANTS, "method": method}
    expected = engine.score_variants(SEQUENCES[0], VARIANTS, method)
    np.testing.assert_allclose(scores(client.post("/v1/scores", json=body)), expected, atol=1e-4)


@pytest.mark.parametrize("method", ["wt-marginals", "masked-marginals"])
def test_scans_are_the_engines(client, engine, method):
    for sequence in (SEQUENCES[0], SEQUENCES[3]):
        body = {"sequence": sequence, "method": method, "encoding_format": "base64"}
        (table,) = arrays(client.post("/v1/scan", json=body), "values")
        np.testing.assert_allclose(table, engine.scan(sequence, method), atol=1e-5)


@pytest.mark.parametrize("call", ["contacts", "logits"])
def test_contacts_and_logits_are_the_engines(client, engine, call):
    body = {"sequences": SEQUENCES, "encoding_format": "base64"}
    found = arrays(client.post(f"/v1/{call}", json=body), "values")
    for ours, theirs in zip(found, getattr(engine, call)(SEQUENCES), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_an_arrow_stream_comes_batch_by_batch_and_says_where_it_comes_from(client, engine):
    sequences = SEQUENCES * 16
    body = {"input": sequences, "pooling": "residue"}
    answer = client.post("/v1/embeddings", json=body, headers=ARROW)
    assert answer.headers["Content-Type"] == ARROW["Accept"]
    reader = pa.ipc.open_stream(answer.content)
    metadata = reader.schema.metadata
    weights = answer.headers["X-Raptide-Weights"].encode()
    assert (metadata[b"model"], metadata[b"weights"]) == (b"raptide", weights)
    assert metadata[b"rows"] == b"64"
    batches = list(reader)
    assert len(batches) > 1
    rows = pa.Table.from_batches(batches).to_pylist()
    assert [row["index"] for row in rows] == list(range(64))
    for row, theirs in zip(rows, engine.embed(sequences, pooling="residue"), strict=True):
        ours = np.array(row["values"], np.float32).reshape(row["shape"])
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_scores_come_as_arrow_too(client, engine):
    answer = client.post("/v1/scores", json={"sequences": SEQUENCES}, headers=ARROW)
    table = pa.ipc.open_stream(answer.content).read_all()
    assert table.schema.names == ["index", "score"]
    np.testing.assert_allclose(table["score"], engine.score_sequences(SEQUENCES), atol=1e-5)


def test_the_model_comes_with_its_lineage(client):
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["width"], model["layers"]) == ("raptide", 32, 2)
    assert model["lineage"] == {"step": 5, "corpus_digest": "abc"}
    assert model["verified"]
    headers = client.post("/v1/embeddings", json={"input": "MK"}).headers
    assert headers["X-Raptide-Model"] == "raptide"
    assert headers["X-Raptide-Weights"] == model["weights"]
    assert headers["X-Raptide-Step"] == "5"


def test_the_status_says_who_serves_what_and_how_busy_it_is(client):
    client.post("/v1/embeddings", json={"input": ["MKTAYIAKQR"] * 30})
    (model,) = client.get("/v1/models").json()["data"]
    until = time.monotonic() + 20
    while (status := client.get("/v1/status").json()["data"][0])["residues_per_s"] < 10:
        assert time.monotonic() < until, status
        time.sleep(0.5)  # gateways share what they hear for two seconds
    assert (status["id"], status["state"], status["queued_tokens"]) == ("raptide", "ready", 0)
    assert status["versions"] == [{"weights": model["weights"], "step": 5, "replicas": 1}]
    (replica,) = status["replicas"]
    assert replica["residues_per_s"] >= 10
    assert set(replica) == {
        *("node", "weights", "step", "queued_tokens", "pending_tokens", "residues_per_s")
    }
    keyless = httpx.get(f"{client.base_url}/v1/status")
    assert keyless.status_code == 401


def test_a_request_keeps_its_id(client):
    given = client.post("/v1/embeddings", json={"input": "MK"}, headers={"X-Request-Id": "abc-123"})
    assert given.headers.get_list("X-Request-Id") == ["abc-123"]
    made = client.post("/v1/embeddings", json={"input": "MK"})
    assert len(made.headers["X-Request-Id"]) > 8


def test_health_readiness_and_docs(client):
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").json() == {"status": "ready", "models": {"raptide": "ready"}}
    assert client.get("/docs").status_code == 200
    paths = client.get("/openapi.json").json()["paths"]
    calls = {"embeddings", "scores", "scan", "contacts", "logits", "models", "status"}
    others = {"/v1/models/{model}", "/healthz", "/readyz"}
    assert {f"/v1/{call}" for call in calls} | others == set(paths)
    for call in ("embeddings", "scores", "scan", "contacts", "logits"):
        headers = {each["name"] for each in paths[f"/v1/{call}"]["post"]["parameters"]}
        assert headers == {"X-Raptide-Timeout-S", "X-Raptide-Weights", "X-Request-Id"}


def test_null_means_the_default_in_every_optional_field(client):
    plain = client.post("/v1/embeddings", json={"input": "MKTAYI"}).json()
    nulls = ("model", "encoding_format", "dimensions", "pooling", "layers", "user")
    asked = client.post("/v1/embeddings", json={"input": "MKTAYI"} | dict.fromkeys(nulls))
    assert asked.status_code == 200, asked.text
    assert asked.json() == plain
    scan = {"sequence": "MKTAYI", "method": None, "encoding_format": None, "model": None}
    assert client.post("/v1/scan", json=scan).status_code == 200


def test_dimensions_are_the_models_or_refused(client):
    width = len(client.post("/v1/embeddings", json={"input": "MK"}).json()["data"][0]["embedding"])
    same = client.post("/v1/embeddings", json={"input": "MK", "dimensions": width})
    assert same.status_code == 200
    other = client.post("/v1/embeddings", json={"input": "MK", "dimensions": width // 2})
    assert other.status_code == 422
    assert other.json()["error"]["param"] == "dimensions"
    assert f"{width} values and are never cut" in other.json()["error"]["message"]


def test_one_model_can_be_asked_for_by_its_name(client):
    (listed,) = client.get("/v1/models").json()["data"]
    assert client.get(f"/v1/models/{listed['id']}").json() == listed
    unknown = client.get("/v1/models/other")
    assert unknown.status_code == 404
    assert "'other' was asked for" in unknown.json()["error"]["message"]


def test_web_pages_from_elsewhere_are_not_let_in_by_default(client):
    headers = {"Origin": "https://lab.example", "Access-Control-Request-Method": "POST"}
    answer = client.options("/v1/embeddings", headers=headers)
    assert answer.status_code == 405
    assert "Access-Control-Allow-Origin" not in answer.headers


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "message"),
    [
        ("embeddings", {"input": ["MK", "M1K"]}, 422, "input", "Sequence 1: .*position 2 holds"),
        ("embeddings", {"input": []}, 422, "input", "at least one"),
        ("embeddings", {"input": ["MK", ""]}, 422, "input", "Sequence 1: .*at least one residue"),
        ("embeddings", {"input": " "}, 422, "input", "at least one residue"),
        ("embeddings", {"input": ["A" * 501]}, 422, "input", "at most 500 residues .*501"),
        ("embeddings", {"input": ["MK"] * 65}, 422, "input", "at most 64 sequences, but 65"),
        ("embeddings", {"input": "MK", "pool": "x"}, 422, "pool", "`pool`"),
        ("embeddings", {"input": "MK", "layers": [3]}, 422, "layers", "layers 0 to 2"),
        ("embeddings", {"input": "MK", "layers": []}, 422, "layers", "at least one layer"),
        ("embeddings", {"input": "MK", "layers": [1, 1]}, 422, "layers", "each layer once"),
        ("embeddings", {"input": "MK", "layers": [-1] * 30_000}, 422, "layers", "30,000 were"),
        ("embeddings", {"input": [5, 6, 7]}, 422, "input", "letters, but token ids"),
        ("embeddings", {"input": [[5, 6], [7]]}, 422, "input", "letters, but token ids"),
        ("embeddings", {}, 422, "input", "`input`: field required"),
        ("embeddings", {"input": "MK", "model": "other"}, 404, "model", "serves 'raptide'"),
        ("scores", {"sequences": ["A" * 400]}, 422, "sequences", "160,800 tokens to compute"),
        ("scores", {"sequences": ["MK"], "method": "magic"}, 422, "method", "`method`"),
        ("scores", {"sequences": ["MK"], "method": "wt-marginals"}, 422, "method", "one-pass"),
        ("scores", {"sequences": 3}, 422, "sequences", "`sequences"),
        ("scores", {"sequences": ["M?"]}, 422, "sequences", "position 2 holds"),
        ("scores", {}, 422, "sequences", "Give `sequences`, or"),
        ("scores", {"sequence": "MK"}, 422, "variants", "together"),
        ("scores", {"sequence": "MK", "variants": []}, 422, "variants", "at least one"),
        ("scores", {"sequence": "MK", "variants": ["K3A"]}, 422, "variants", "position 3 is"),
        (
            "scores",
            {"sequence": "MK", "variants": ["M2A"], "method": "pseudo-ppl"},
            422,
            "variants",
            "expects M at position 2",
        ),
        ("scan", {"sequence": "M1"}, 422, "sequence", "^Residues are"),
        ("nothing", {}, 404, None, "Not Found"),
    ],
)
def test_a_bad_request_gets_one_sentence(client, path, body, status, param, message):
    answer = client.post(f"/v1/{path}", json=body)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"type", "message", "param"}
    assert error["param"] == param
    assert "\n" not in error["message"]
    assert re.search(message, error["message"]), error["message"]


@pytest.mark.parametrize(
    ("headers", "status", "message"),
    [
        ({"Content-Type": "text/plain"}, 422, "Content-Type: application/json"),
        ({"Content-Type": "application/json", "Content-Encoding": "gzip"}, 415, "uncompressed"),
    ],
)
def test_what_is_no_plain_json_is_told_how_to_be_sent(client, headers, status, message):
    answer = client.post("/v1/embeddings", content=b'{"input": "MK"}', headers=headers)
    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]


def test_broken_json_is_refused(client):
    answer = client.post(
        "/v1/embeddings", content=b"{", headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 422
    assert answer.json()["error"]["message"].startswith("`body`: broken JSON")


def test_a_body_is_refused_before_it_has_all_come(client):
    """Announced or not: the second one never ends, and is answered all the same."""
    announced = client.post("/v1/embeddings", json={"input": ["A" * 400] * 300})
    assert announced.status_code == 413
    assert "at most 100,000 bytes" in announced.json()["error"]["message"]

    head = "POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
    head += f"Authorization: Bearer {key_of(client)}\r\n\r\n"
    sent = 0
    with socket.create_connection((client.base_url.host, client.base_url.port), 60) as raw:
        raw.sendall(head.encode())
        while not select.select([raw], [], [], 0.001)[0]:
            raw.sendall(b"2710\r\n" + b" " * 10_000 + b"\r\n")
            sent += 10_000
        assert raw.recv(1000).startswith(b"HTTP/1.1 413 ")
    assert sent < 2**26


def test_white_space_and_a_stop_are_not_billed(client, engine):
    answer = client.post("/v1/embeddings", json={"input": "mk ta\n*"}).json()
    assert answer["usage"]["prompt_tokens"] == 4
    np.testing.assert_allclose(answer["data"][0]["embedding"], engine.embed(["MKTA"])[0], atol=1e-5)


def test_a_full_queue_answers_429_with_retry_after(client):
    answers = asyncio.run(ask_all(client, "/v1/scores", [{"sequences": ["A" * 300]}] * 12))
    assert {answer.status_code for answer in answers} == {200, 429}
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert int(refused.headers["Retry-After"]) >= 1
    assert refused.json()["error"]["type"] == "overloaded"


def test_past_its_deadline_a_request_is_answered_504(client):
    headers = {"X-Raptide-Timeout-S": "0.05"}
    answer = client.post("/v1/scores", json={"sequences": ["A" * 300]}, headers=headers)
    assert answer.status_code == 504
    assert answer.json()["error"]["type"] == "deadline"
    assert "0.05 s" in answer.json()["error"]["message"]


def test_a_client_that_leaves_frees_the_queue(client):
    """More than the queue holds is asked for and given up, again and again."""
    body = {"sequences": ["A" * 250]}
    client.post("/v1/embeddings", json={"input": "MK"})
    for _ in range(6):
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/scores", json=body, timeout=0.05)
    time.sleep(0.5)
    assert client.post("/v1/scores", json=body).status_code == 200


def test_many_clients_at_once_get_their_own_answers(client, engine):
    rng = np.random.default_rng(2)
    sequences = ["".join(rng.choice(list("LAGVSERTIDPK"), rng.integers(5, 300))) for _ in range(60)]
    bodies = [{"input": sequence} for sequence in sequences]
    answers = asyncio.run(ask_all(client, "/v1/embeddings", bodies))
    vectors = [answer.json()["data"][0]["embedding"] for answer in answers]
    np.testing.assert_allclose(np.array(vectors), engine.embed(sequences), atol=1e-5)


def test_a_model_without_a_language_model_head_embeds_and_refuses_the_rest(keyed):
    with keyed.client("lab") as lab:
        base, tuned = lab.get("/v1/models").json()["data"]
        assert base["calls"] == ["embeddings", "contacts", "logits", "scan", "scores"]
        assert (tuned["calls"], tuned["verified"]) == (["embeddings", "contacts"], True)
        for path, body, status in (
            ("embeddings", {"input": "MKTA"}, 200),
            ("contacts", {"sequences": "MKTA"}, 200),
            ("logits", {"sequences": "MKTA"}, 422),
            ("scan", {"sequence": "MKTA"}, 422),
            ("scores", {"sequences": ["MKTA"]}, 422),
            ("scores", {"sequence": "MKTA", "variants": ["M1A"]}, 422),
            ("scores", {"sequence": "MKTA", "variants": ["M1A"], "method": "pseudo-ppl"}, 422),
        ):
            answer = lab.post(f"/v1/{path}", json=body | {"model": "tuned"})
            assert answer.status_code == status, answer.text
            if status == 422:
                assert answer.json()["error"]["param"] == "model"
                assert answer.json()["error"]["message"] == (
                    "This model has no language-model head, so it answers embeddings and contacts "
                    "alone; ask another model."
                )
    with (
        Client(keyed.url, key=keyed.keys["lab"], model="tuned") as client,
        pytest.raises(ConfigError, match="no language-model head"),
    ):
        client.score_sequences(["MKTA"])


def test_bad_arguments_are_refused_before_anything_is_deployed(tmp_path, bundle):
    with pytest.raises(BundleError, match="no model folder"):
        build({"model": str(tmp_path)})
    with pytest.raises(ConfigError, match="there is no setting `modell`; did you mean `model`"):
        build({"model": str(tmp_path), "modell": "x"})
    with pytest.raises(ConfigError, match="give either `model`"):
        build({})
    models = [{"name": "a", "path": str(bundle)}] * 2
    with pytest.raises(ConfigError, match="Two models are called 'a'"):
        build({"models": models})
    with pytest.raises(ConfigError, match="model 0: there is no setting `size`"):
        build({"models": [{**models[0], "size": 3}]})
    with pytest.raises(ConfigError, match="max_replicas is 1, but min_replicas is 2"):
        build({"model": str(bundle), "min_replicas": 2, "max_replicas": 1})


def test_the_production_configuration_is_valid():
    text = (ROOT / "serve/config.yaml").read_text()
    config = ServeDeploySchema.model_validate(yaml.safe_load(text))
    assert config.applications[0].import_path == "serve.app:build"
