"""Long proteins and dear scores over HTTP are the engine's: windows joined, positions split."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from draws import random_sequence, random_weights
from fake_endpoint import ARROW, Server, refuse

from raptide import Client, ConfigError, SequenceError
from raptide.client import pieces
from raptide.inference.engine import Engine

LIMIT = 40


@pytest.fixture(scope="module")
def engine():
    """ESM-1b with places for 40 residues."""
    weights = random_weights(family="esm1b", layers=2, width=32, heads=4, max_positions=LIMIT + 2)
    return Engine(weights.build(), {}, torch.device("cpu"), 128)


@pytest.fixture
def remote(engine):
    """A client of an endpoint that answers with the engine, and refuses what is long."""
    server = Server()
    server.max_residues = LIMIT
    server.respond = lambda handler, body: respond(handler, body, engine)
    with Client(server.url, chunk_sequences=5) as client:
        client.server = server
        yield client
    server.die()


def respond(handler, body, engine):
    sequences = body.get("input") or body.get("sequences") or [body["sequence"]]
    for index, each in enumerate(sequences):
        if len(each) > LIMIT:
            return refuse(422, message=f"Sequence {index}: too long.", param="input")(handler)
    if handler.path == "/v1/scores":
        rows = [{"score": s} for s in engine.score_sequences(sequences, body["method"])]
        data = [row | {"index": index} for index, row in enumerate(rows)]
        return handler.answer(200, json.dumps({"data": data}).encode())
    return handler.answer(200, arrow(arrays(handler.path, body, sequences, engine)), ARROWS)


ARROWS = {"Content-Type": ARROW}


def arrays(path, body, sequences, engine):
    if path == "/v1/scan":
        return [engine.scan(sequences[0], body["method"])]
    if path == "/v1/embeddings":
        return list(engine.embed(sequences, body.get("layers", (-1,)), body["pooling"]))
    if "masked_positions" in body:
        assert all(len(each) <= LIMIT for each in body["masked_positions"])
        positions = [[place - 1 for place in each] for each in body["masked_positions"]]
        return engine.masked_log_p(list(zip(sequences, positions, strict=True)))
    return engine.logits(sequences)


def arrow(arrays):
    import pyarrow as pa

    columns = {
        "index": range(len(arrays)),
        "values": [array.reshape(-1).astype(np.float32) for array in arrays],
        "shape": [array.shape for array in arrays],
    }
    sink = pa.BufferOutputStream()
    table = pa.table(columns)
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def proteins():
    """Some that fit and some that do not, among them one beside the limit."""
    return [random_sequence(length) for length in (7, LIMIT, LIMIT + 1, 3, 137, 12, 90)]


def assert_same(found, expected):
    assert type(found) is type(expected)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert np.shape(one) == np.shape(other)
        assert getattr(one, "dtype", None) == getattr(other, "dtype", None)
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "bos", "residue"])
@pytest.mark.parametrize("layers", [None, [0, -1]])
def test_embeddings_in_windows(remote, engine, pooling, layers):
    given = proteins()
    expected = engine.embed(given, layers or (-1,), pooling, "window")
    assert_same(remote.embed(given, pooling, layers, "window"), expected)
    assert_same(list(remote.embed(iter(given), pooling, layers, "window")), list(expected))


def test_logits_in_windows(remote, engine):
    given = proteins()
    assert_same(remote.logits(given, "window"), engine.logits(given, "window"))


@pytest.mark.parametrize("method", ["pseudo-ppl", "one-pass"])
@pytest.mark.parametrize("budget", [32_768, 200])
def test_scores_in_windows_and_split_by_position(remote, engine, method, budget, monkeypatch):
    monkeypatch.setattr(pieces, "MASKED", replace(pieces.MASKED, tokens=budget))
    given = proteins()
    expected = engine.score_sequences(given, method, "window")
    assert_same(remote.score_sequences(given, method, "window"), expected)


def test_dear_scores_are_split_without_windows_too(remote, engine, monkeypatch):
    """No request costs more than the budget, and the score is the whole one's."""
    monkeypatch.setattr(pieces, "MASKED", replace(pieces.MASKED, tokens=200))
    given = [random_sequence(LIMIT), "MKT", random_sequence(20)]
    assert_same(remote.score_sequences(given), engine.score_sequences(given))
    masked = [b for b, _ in remote.server.requests if "masked_positions" in b]
    assert len(masked) > 10
    for body in masked:
        pairs = zip(body["sequences"], body["masked_positions"], strict=True)
        assert sum((len(each) + 2) * len(places) for each, places in pairs) <= 200


@pytest.mark.parametrize("method", ["wt-marginals", "masked-marginals", "pseudo-ppl"])
@pytest.mark.parametrize("length", [LIMIT, 95])
def test_variants_in_windows(remote, engine, method, length):
    sequence = random_sequence(length)
    first, last = sequence[0], sequence[-1]
    variants = [f"{first}1A", f"{last}{length}W:{first}1C", f"{sequence[30]}31G", f"{first}1A"]
    expected = engine.score_variants(sequence, variants, method, "window")
    assert_same(remote.score_variants(sequence, variants, method, "window"), expected)


def test_a_position_that_many_variants_change_is_masked_once(remote):
    sequence = random_sequence(LIMIT)
    variants = [f"{sequence[4]}5{letter}" for letter in "ACDEFGHIKLMNPQRSTVWY"]
    remote.score_variants(sequence, variants, "masked-marginals")
    ((body, _),) = remote.server.requests
    assert body["masked_positions"] == [[5]]


@pytest.mark.parametrize("method", ["wt-marginals", "masked-marginals"])
@pytest.mark.parametrize("length", [LIMIT, 95])
def test_scans_in_windows(remote, engine, method, length):
    sequence = random_sequence(length)
    assert_same(remote.scan(sequence, method, "window"), engine.scan(sequence, method, "window"))


def test_long_ones_are_refused_unless_windows_are_asked_for(remote):
    with pytest.raises(SequenceError, match=r"^Sequence 6: too long"):
        remote.embed([*["MKT"] * 6, random_sequence(LIMIT + 1)])
    with pytest.raises(ConfigError, match="long must be one of 'error', 'window'"):
        remote.embed(["MKT"], long="cut")
