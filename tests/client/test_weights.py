"""One call never mixes the vectors of two models: a local server plays updates."""

import numpy as np
import pytest
from fake_endpoint import Server, refuse, versions

from raptide import Client, ConfigError, ServiceError

SEQUENCES = ["M" * (1 + i % 5) for i in range(40)]


@pytest.fixture
def server():
    server = Server()
    yield server
    server.die()


def embed(server, sequences=SEQUENCES, **options):
    with Client(server.url, chunk_sequences=2, **options) as client:
        vectors = client.embed(sequences)
        (digest,) = set(vectors[:, 0].tolist())
        assert vectors[:, 1].tolist() == [len(each) for each in sequences]
        assert client.weights == str(int(digest))
        return digest


def alternate(count):
    """Both versions answer; who pins none meets one after the other."""
    return ["1", "2"] if count % 2 else ["2", "1"]


def test_a_call_stays_with_the_weights_it_met_first_while_two_versions_answer(server):
    server.respond = versions(alternate)
    assert embed(server) in (1, 2)
    assert len(server.requests) <= 20 + 3  # the first ones, in flight together, know of none


def test_a_pin_is_one_calls_alone(server):
    server.respond = versions(lambda count: ["1"] if count < 20 else ["2"])
    with Client(server.url, chunk_sequences=2) as client:
        assert client.weights is None
        assert set(client.embed(SEQUENCES)[:, 0]) == {1}
        assert client.weights == "1"
        assert set(client.embed(SEQUENCES)[:, 0]) == {2}
        assert client.weights == "2"


def test_a_list_is_started_over_when_its_weights_are_gone(server):
    server.respond = versions(lambda count: ["1"] if count < 10 else ["2"])
    assert embed(server) == 2
    assert len(server.requests) >= 10 + 20


def test_a_list_is_started_over_where_the_endpoint_knows_no_pins(server):
    server.respond = versions(
        lambda count: alternate(count) if count < 16 else ["2"], supports_pins=False
    )
    assert embed(server) == 2


def test_an_endpoint_that_never_settles_is_given_up(server):
    server.respond = versions(lambda count: [str(count)])
    with pytest.raises(ServiceError, match="went on changing"):
        embed(server, retry_s=1)


def test_a_generator_that_has_given_results_raises_when_its_weights_are_gone(server):
    server.respond = versions(lambda count: ["1"] if count < 12 else ["2"])
    given = []
    with Client(server.url, chunk_sequences=1, parallel=1) as client:
        with pytest.raises(ServiceError, match="the weights 1, which answered the first") as caught:
            given.extend(client.embed(iter(SEQUENCES)))
        assert "\n" not in str(caught.value)
    assert 0 < len(given) < len(SEQUENCES)
    assert {vector[0] for vector in given} == {1}


def test_a_generator_that_has_given_none_is_started_over(server):
    """The first request has to be repeated; meanwhile the second has met the old weights."""
    server.mishaps = [refuse(503)]
    server.respond = versions(lambda count: ["1"] if count < 2 else ["2"])
    with Client(server.url, chunk_sequences=1, parallel=1) as client:
        vectors = list(client.embed(iter(SEQUENCES)))
    assert [vector[1] for vector in vectors] == [len(each) for each in SEQUENCES]
    assert {vector[0] for vector in vectors} == {2}


def test_weights_that_are_asked_for_are_the_only_ones_to_answer(server):
    server.respond = versions(alternate)
    assert embed(server, weights="2") == 2
    assert len(server.requests) == 20
    assert {headers["X-Raptide-Weights"] for _, headers in server.requests} == {"2"}
    with pytest.raises(ServiceError, match="The weights 3 that the client was given"):
        embed(server, weights="3")


@pytest.mark.parametrize("status", [409, 410])
def test_a_conflict_of_another_kind_is_a_refusal(server, status):
    server.mishaps = [refuse(status, message="Something else.")]
    with Client(server.url) as client, pytest.raises(ConfigError, match=f"{status}: Something"):
        client.embed(["MKT"])


def test_answers_tell_what_answered_and_how(server):
    server.respond = versions(lambda count: ["1"])
    server.mishaps = [refuse(503)]
    with Client(server.url, chunk_sequences=2) as client:
        answer = client.detailed.embed(["MK", "MKT", "M"], request_id="mine")
        np.testing.assert_array_equal(answer.result, client.embed(["MK", "MKT", "M"]))
        assert (answer.model, answer.weights, answer.step) == ("m", "1", 7)
        assert (answer.residues, answer.requests, answer.attempts) == (6, 2, 3)
        assert (answer.queue_s, answer.compute_s) == (pytest.approx(0.04), pytest.approx(0.06))
        assert answer.request_id == "mine"
        ids = {headers["X-Request-Id"] for _, headers in server.requests[:3]}
        assert ids == {"mine-0", "mine-1"}
        lazy = client.detailed.embed(iter(["MK"] * 10))
        assert lazy.requests == 0
        assert len(list(lazy.result)) == 10
        assert (lazy.residues, lazy.requests) == (20, 5)


def test_what_started_over_counts_once(server):
    server.respond = versions(lambda count: ["1"] if count < 10 else ["2"])
    with Client(server.url, chunk_sequences=2) as client:
        answer = client.detailed.embed(SEQUENCES)
    assert (answer.weights, answer.requests) == ("2", 20)
    assert answer.residues == sum(map(len, SEQUENCES))
