"""Log probabilities of chosen residues, masked in turn: what pseudo perplexities are split into."""

import base64
import re

import numpy as np
import pytest

SEQUENCES = ["MKTAYIAKQR", "GSHMLEDPVA" * 8]
POSITIONS = [[1, 10, 3], list(range(1, 81))]


def ask(client, **body):
    return client.post("/v1/logits", json={"encoding_format": "base64"} | body)


def tables(answer):
    rows = answer.json()["data"]
    return [
        np.frombuffer(base64.b64decode(row["values"]), "<f4").reshape(row["shape"]) for row in rows
    ]


def test_each_position_is_masked_alone_as_the_engine_does_it(client, engine):
    answer = ask(client, sequences=SEQUENCES, masked_positions=POSITIONS)
    assert answer.status_code == 200
    counted_from_0 = [[place - 1 for place in some] for some in POSITIONS]
    expected = engine.masked_log_p(list(zip(SEQUENCES, counted_from_0, strict=True)))
    for found, table in zip(tables(answer), expected, strict=True):
        assert found.shape == table.shape
        np.testing.assert_allclose(found, table, atol=1e-5)
        np.testing.assert_allclose(np.exp(found).sum(-1), 1, atol=1e-4)


def test_null_is_logits_with_nothing_masked(client, engine):
    answer = ask(client, sequences=SEQUENCES, masked_positions=None)
    for found, table in zip(tables(answer), engine.logits(SEQUENCES), strict=True):
        np.testing.assert_allclose(found, table, atol=1e-5)


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([[1]], "a list for each sequence, but 1 were given for 2"),
        ([[0], [1]], "from 1 to 10 of sequence 0.*but 0 was given"),
        ([[1], [81]], "from 1 to 80 of sequence 1.*but 81 was given"),
        ([[], [1]], r"at least one and each once, but \[\]"),
        ([[1, 1], [1]], r"each once, but \[1, 1\]"),
    ],
)
def test_positions_that_do_not_fit_are_refused(client, positions, message):
    answer = ask(client, sequences=SEQUENCES, masked_positions=positions)
    assert answer.status_code == 422
    error = answer.json()["error"]
    assert error["param"] == "masked_positions"
    assert re.search(message, error["message"])


def test_it_costs_a_pass_a_position(client):
    """The whole protein, every residue masked, is refused here; a few positions of it are not."""
    long = "LAGVSERTID" * 50
    whole = ask(client, sequences=[long], masked_positions=[list(range(1, 501))])
    assert whole.status_code == 422
    assert "251,000 tokens" in whole.json()["error"]["message"]
    assert ask(client, sequences=[long], masked_positions=[[1, 500]]).status_code == 200
