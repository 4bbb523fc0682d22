"""The deployed application over HTTP, against the engine."""

import asyncio
import base64
import re
import socket
from dataclasses import replace

import httpx
import numpy as np
import pytest
import yaml
from conftest import ROOT
from ray import serve as ray_serve
from ray.serve.schema import ServeDeploySchema

from raptide.errors import BundleError, ConfigError
from raptide.inference.engine import Engine
from raptide.model.bundle import write_bundle
from raptide.model.config import ModelSettings
from raptide.model.transformer import Esm
from raptide.model.weights import Weights
from serve.app import build

SEQUENCES = ["MKTAYIAKQR", "GSHMLEDPVAFYW", "M", "LAGVSERTIDPKQNFYMHWC" * 10]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    model = Esm(ModelSettings(layers=2, width=32, heads=4)).initialise(1)
    folder = tmp_path_factory.mktemp("bundle")
    lineage = {"step": 5, "corpus_digest": "abc"}
    write_bundle(folder, replace(Weights.of(model), lineage=lineage))
    return folder


@pytest.fixture(scope="module")
def client(cluster, bundle):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ray_serve.start(http_options={"host": "127.0.0.1", "port": port})
    arguments = {"model": str(bundle), "max_sequences": 8, "max_residues": 500}
    arguments["max_queued_tokens"] = 100_000
    ray_serve.run(build(arguments), name="raptide")
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60.0) as client:
        yield client
    ray_serve.shutdown()


@pytest.fixture(scope="module")
def engine(bundle):
    return Engine.load(bundle)


def test_embeddings_are_the_engines(client, engine):
    answer = client.post("/v1/embeddings", json={"input": SEQUENCES}).json()
    vectors = np.array([row["embedding"] for row in answer["data"]])
    np.testing.assert_allclose(vectors, engine.embed(SEQUENCES), atol=1e-5)
    assert [row["index"] for row in answer["data"]] == [0, 1, 2, 3]
    assert answer["usage"]["prompt_tokens"] == sum(map(len, SEQUENCES))


def test_one_string_residues_and_base64(client, engine):
    body = {"input": SEQUENCES[0], "pooling": "residue", "encoding_format": "base64"}
    (row,) = client.post("/v1/embeddings", json=body).json()["data"]
    array = np.frombuffer(base64.b64decode(row["embedding"]), "<f4").reshape(row["shape"])
    np.testing.assert_allclose(array, engine.embed(SEQUENCES[:1], pooling="residue")[0], atol=1e-5)


@pytest.mark.parametrize("method", ["pseudo-ppl", "one-pass"])
def test_scores_are_the_engines(client, engine, method):
    body = {"sequences": SEQUENCES[:3], "method": method}
    rows = client.post("/v1/scores", json=body).json()["data"]
    scores = np.array([row["score"] for row in rows])
    np.testing.assert_allclose(scores, engine.score_sequences(SEQUENCES[:3], method), atol=1e-5)
    assert rows[0]["perplexity"] == pytest.approx(np.exp(-scores[0]))


def test_the_model_comes_with_its_lineage(client):
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["width"], model["layers"]) == ("raptide", 32, 2)
    assert model["lineage"] == {"step": 5, "corpus_digest": "abc"}


def test_health_readiness_and_docs(client):
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").json() == {"status": "ready"}
    assert client.get("/docs").status_code == 200
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/v1/embeddings", "/v1/scores", "/v1/models", "/healthz", "/readyz"} <= set(paths)


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("embeddings", {"input": ["MK", "M1K"]}, 422, "Sequence 1: .*position 2 holds '1'"),
        ("embeddings", {"input": []}, 422, "at least one sequence"),
        ("embeddings", {"input": ["MK", ""]}, 422, "Sequence 1: .*at least one residue"),
        ("embeddings", {"input": " "}, 422, "at least one residue"),
        ("embeddings", {"input": ["A" * 501]}, 422, "at most 500 residues .*501"),
        (
            "scores",
            {"sequences": ["A" * 400]},
            422,
            "160,800 tokens to compute, more than the 100,000",
        ),
        ("embeddings", {"input": ["MK"] * 9}, 422, "at most 8 sequences, but 9"),
        ("embeddings", {"input": "MK", "pool": "x"}, 422, "`pool`"),
        ("embeddings", {}, 422, "`input`: field required"),
        ("scores", {"sequences": ["MK"], "method": "magic"}, 422, "`method`"),
        ("scores", {"sequences": 3}, 422, "`sequences"),
        ("scores", {"sequences": ["M?"]}, 422, "position 2 holds"),
        ("embeddings", {"input": "MK", "model": "other"}, 404, "serves 'raptide'"),
        ("nothing", {}, 404, "Not Found"),
    ],
)
def test_a_bad_request_gets_one_sentence(client, path, body, status, message):
    answer = client.post(f"/v1/{path}", json=body)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"type", "message", "param"}
    assert "\n" not in error["message"]
    assert re.search(message, error["message"]), error["message"]


def test_broken_json_is_refused(client):
    answer = client.post(
        "/v1/embeddings", content=b"{", headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 422
    assert answer.json()["error"]["message"].startswith("`body`: broken JSON")


def test_white_space_and_a_stop_are_not_billed(client, engine):
    answer = client.post("/v1/embeddings", json={"input": "mk ta\n*"}).json()
    assert answer["usage"]["prompt_tokens"] == 4
    np.testing.assert_allclose(answer["data"][0]["embedding"], engine.embed(["MKTA"])[0], atol=1e-5)


def test_a_full_queue_answers_429_with_retry_after(client):
    body = {"sequences": ["A" * 300]}

    async def ask():
        async with httpx.AsyncClient(base_url=client.base_url, timeout=60.0) as many:
            return await asyncio.gather(*(many.post("/v1/scores", json=body) for _ in range(12)))

    answers = asyncio.run(ask())
    assert {answer.status_code for answer in answers} == {200, 429}
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert refused.headers["Retry-After"] == "1"
    assert refused.json()["error"]["type"] == "overloaded"


def test_many_clients_at_once_get_their_own_answers(client, engine):
    rng = np.random.default_rng(2)
    sequences = ["".join(rng.choice(list("LAGVSERTIDPK"), rng.integers(5, 300))) for _ in range(60)]

    async def ask():
        async with httpx.AsyncClient(base_url=client.base_url, timeout=60.0) as many:
            jobs = [many.post("/v1/embeddings", json={"input": s}) for s in sequences]
            return await asyncio.gather(*jobs)

    vectors = [answer.json()["data"][0]["embedding"] for answer in asyncio.run(ask())]
    np.testing.assert_allclose(np.array(vectors), engine.embed(sequences), atol=1e-5)


def test_bad_arguments_are_refused_before_anything_is_deployed(tmp_path):
    with pytest.raises(BundleError, match="no model folder"):
        build({"model": str(tmp_path)})
    with pytest.raises(ConfigError, match="there is no setting `modell`; did you mean `model`"):
        build({"model": str(tmp_path), "modell": "x"})


def test_the_production_configuration_is_valid():
    text = (ROOT / "serve/config.yaml").read_text()
    config = ServeDeploySchema.model_validate(yaml.safe_load(text))
    assert config.applications[0].import_path == "serve.app:build"
