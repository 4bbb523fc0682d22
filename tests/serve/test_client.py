"""`raptide.Client` against a deployed application: the engine's names, the engine's results."""

import asyncio
import os
import signal
import threading
import time

import numpy as np
import psutil
import pytest

from raptide import AsyncClient, Client, ConfigError, SequenceError

SEQUENCES = ["MKTAYIAKQR", "gshml edpvafyw*", "M", "LAGVSERTIDPKQNFYMHWC" * 10]
VARIANTS = ["K2A", "K2A:Q9E", "M1G"]


@pytest.fixture
def url(client, proxy, monkeypatch):
    monkeypatch.setenv("RAPTIDE_API_KEY", proxy.key)
    return str(client.base_url)


@pytest.fixture
def remote(url):
    with Client(url, chunk_sequences=3) as remote:
        yield remote


def assert_same(found, expected):
    assert type(found) is type(expected)
    if isinstance(expected, list):
        assert len(found) == len(expected)
        for pair in zip(found, expected, strict=True):
            assert_same(*pair)
        return
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "bos", "residue"])
def test_embeddings_are_the_engines(remote, engine, pooling):
    assert_same(remote.embed(SEQUENCES, pooling), engine.embed(SEQUENCES, pooling=pooling))


@pytest.mark.parametrize("method", ["pseudo-ppl", "one-pass"])
def test_scores_are_the_engines(remote, engine, method):
    found = remote.score_sequences(SEQUENCES, method)
    assert_same(found, engine.score_sequences(SEQUENCES, method))


@pytest.mark.parametrize("pooling", ["mean", "residue"])
@pytest.mark.parametrize("layers", [[0], [0, -1], [2, 1, 0]])
def test_layers_are_the_engines(remote, engine, pooling, layers):
    found = remote.embed(SEQUENCES, pooling, layers)
    assert_same(found, engine.embed(SEQUENCES, layers, pooling))


@pytest.mark.parametrize("method", ["wt-marginals", "masked-marginals", "pseudo-ppl"])
def test_variants_are_the_engines(remote, engine, method):
    variants = [*VARIANTS, "Q9E", "R10W"]
    found = remote.score_variants(SEQUENCES[0], variants, method)
    assert_same(found, engine.score_variants(SEQUENCES[0], variants, method))
    assert remote.score_variants(SEQUENCES[0], []).shape == (0,)


@pytest.mark.parametrize("method", ["wt-marginals", "masked-marginals"])
def test_a_scan_is_the_engines(remote, engine, method):
    assert_same(remote.scan(SEQUENCES[0], method), engine.scan(SEQUENCES[0], method))


@pytest.mark.parametrize("name", ["contacts", "logits"])
def test_tables_are_the_engines(remote, engine, name):
    expected = getattr(engine, name)(SEQUENCES)
    assert_same(getattr(remote, name)(SEQUENCES), expected)
    assert_same(list(getattr(remote, name)(iter(SEQUENCES))), expected)


def test_a_dear_score_is_split_by_position(remote, engine, client):
    """All residues of 320 masked in one request are more than this endpoint lets wait."""
    dear = "LAGVSERTID" * 32
    assert client.post("/v1/scores", json={"sequences": [dear]}).status_code == 422
    assert_same(remote.score_sequences([dear]), engine.score_sequences([dear]))


def test_answers_say_which_weights_they_come_from(remote, client):
    answer = remote.detailed.embed(SEQUENCES)
    (model,) = client.get("/v1/models").json()["data"]
    assert (answer.model, answer.weights, answer.step) == ("raptide", model["weights"], 5)
    assert remote.weights == model["weights"]
    assert answer.residues == sum(len(each.rstrip("*").replace(" ", "")) for each in SEQUENCES)
    assert 0 < answer.compute_s < 60


def test_the_async_client_gives_the_same(url, engine):
    async def main():
        async with AsyncClient(url, chunk_sequences=3) as remote:
            streamed = [vector async for vector in remote.embed(iter(SEQUENCES * 3))]
            return await remote.embed(SEQUENCES), await remote.scan(SEQUENCES[0]), streamed

    vectors, table, streamed = asyncio.run(main())
    assert_same(vectors, engine.embed(SEQUENCES))
    assert_same(table, engine.scan(SEQUENCES[0]))
    assert_same(np.stack(streamed), engine.embed(SEQUENCES * 3))


def test_a_generator_gives_a_generator(remote, engine):
    results = remote.embed(each for each in SEQUENCES * 5)
    assert not isinstance(results, list | np.ndarray)
    assert_same(np.stack(list(results)), engine.embed(SEQUENCES * 5))
    scores = remote.score_sequences(iter(SEQUENCES), "one-pass")
    assert_same(np.array(list(scores)), engine.score_sequences(SEQUENCES, "one-pass"))


def test_the_model_is_described(remote, engine):
    (model,) = remote.models()
    assert (model["width"], model["lineage"]) == (engine.width, engine.lineage)
    assert model["max_residues"] == engine.max_residues


def test_what_the_endpoint_refuses_is_the_engines_error(remote, url):
    with pytest.raises(SequenceError, match=r"^Sequence 4: at most 500 residues .* 501"):
        remote.embed(["MK"] * 4 + ["A" * 501])
    with pytest.raises(SequenceError, match=r"expects A at position 2, but .* K there"):
        remote.score_variants(SEQUENCES[0], ["A2K"])
    with pytest.raises(ConfigError, match="layer 9"):
        remote.embed(["MK"], layers=[9])
    with pytest.raises(ConfigError, match="pooling"):
        remote.embed(["MK"], pooling="max")
    with Client(url, model="other") as other, pytest.raises(ConfigError, match="'other'"):
        other.embed(["MK"])


@pytest.mark.parametrize(
    "victim",
    [pytest.param("ProxyActor", marks=pytest.mark.thorough), "ServeReplica:raptide:Gateway"],
)
def test_a_killed_process_is_not_seen(url, engine, victim):
    """Requests run from several threads while the process they all go through is killed."""
    sequences = [each[:200] for each in SEQUENCES]
    expected = engine.embed(sequences)
    stop = threading.Event()
    answers, failures = [], []

    def ask():
        with Client(url) as remote:
            while not stop.is_set():
                try:
                    answers.append(remote.embed(sequences))
                except Exception as error:
                    failures.append(error)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        time.sleep(1.0)
        (process,) = processes_named(victim)
        os.kill(process.pid, signal.SIGKILL)
        before = len(answers)
        deadline = time.monotonic() + 100
        while len(answers) < before + 40 and not failures:
            assert time.monotonic() < deadline, "no answers after the kill"
            time.sleep(0.1)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures
    assert not process.is_running()
    for answer in answers:
        np.testing.assert_allclose(answer, expected, atol=1e-5)


def processes_named(name):
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if name in process.cmdline()[0]:
                found.append(process)
        except (psutil.NoSuchProcess, IndexError):
            continue
    return found
