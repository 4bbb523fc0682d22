"""The same calls over gRPC, against the engine."""

import json
import time

import grpc
import numpy as np
import pytest

from serve.rpc import raptide_pb2 as pb
from serve.rpc.joining import join_arrays
from serve.rpc.raptide_pb2_grpc import RaptideStub

SEQUENCES = ["MKTAYIAKQR", "GSHMLEDPVAFYW", "LAGVSERTIDPKQNFYMHWC" * 10]


@pytest.fixture
def call(client, proxy):
    """Call a method with a key; several messages come back as a list."""
    with grpc.insecure_channel(proxy.grpc) as channel:
        stub = RaptideStub(channel)

        def run(method, request, key=proxy.key, **more):
            metadata = [("application", "raptide"), ("authorization", f"Bearer {key}")]
            metadata += [(name.replace("_", "-"), value) for name, value in more.items()]
            found = getattr(stub, method)(request, metadata=metadata, timeout=60)
            return list(found) if hasattr(found, "__next__") else found

        yield run


def arrays(parts):
    parts = list(parts)
    first = [array.index for part in parts for array in part.arrays if array.offset == 0]
    assert first == list(range(len(first)))
    assert max(part.ByteSize() for part in parts) <= 3_000_000
    return list(join_arrays(parts))


def test_embeddings_are_the_engines_and_come_batch_by_batch(call, engine):
    given = SEQUENCES * 15
    parts = call("Embed", pb.EmbedRequest(sequences=given, pooling="residue", layers=[0, -1]))
    assert len(parts) > 1
    for ours, theirs in zip(arrays(parts), engine.embed(given, (0, -1), "residue"), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert (parts[0].source.model, parts[0].source.step) == ("raptide", 5)


def test_an_array_above_three_megabytes_comes_in_parts(call, engine):
    given = ["MKTAYIAKQR" * 50, "MK", "GSHML" * 100]
    layers = (0, 1, 2)
    parts = call("Embed", pb.EmbedRequest(sequences=given, pooling="residue", layers=layers))
    for ours, theirs in zip(arrays(parts), engine.embed(given, layers, "residue"), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    tables = arrays(call("Contacts", pb.SequencesRequest(sequences=given)))
    for ours, theirs in zip(tables, engine.contacts(given), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_the_other_arrays_are_the_engines(call, engine):
    for method, kind, expected in (
        ("Logits", pb.LogitsRequest, engine.logits(SEQUENCES)),
        ("Contacts", pb.SequencesRequest, engine.contacts(SEQUENCES)),
    ):
        request = kind(sequences=SEQUENCES)
        for ours, theirs in zip(arrays(call(method, request)), expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)
    (table,) = arrays(call("Scan", pb.ScanRequest(sequence=SEQUENCES[0])))
    np.testing.assert_allclose(table, engine.scan(SEQUENCES[0]), atol=1e-5)


def test_chosen_residues_are_masked_in_turn(call, engine):
    chosen = [[9, 0, 4], [2], list(range(200))]
    positions = [pb.Positions(positions=[place + 1 for place in some]) for some in chosen]
    request = pb.LogitsRequest(sequences=SEQUENCES, masked_positions=positions)
    expected = engine.masked_log_p(list(zip(SEQUENCES, chosen, strict=True)))
    for ours, theirs in zip(arrays(call("Logits", request)), expected, strict=True):
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_scores_are_the_engines(call, engine):
    answer = call("Score", pb.ScoreRequest(sequences=SEQUENCES, method="one-pass"))
    expected = engine.score_sequences(SEQUENCES, "one-pass")
    np.testing.assert_allclose(answer.scores, expected, atol=1e-5)
    for method in ("wt-marginals", "pseudo-ppl"):
        variants = ["K2A", "M1W:R10A"]
        request = pb.ScoreRequest(sequences=SEQUENCES[:1], variants=variants, method=method)
        expected = engine.score_variants(SEQUENCES[0], variants, method)
        np.testing.assert_allclose(call("Score", request).scores, expected, atol=1e-4)


def test_models_come_with_their_lineage(call):
    (text,) = call("ListModels", pb.ListModelsRequest()).json
    assert json.loads(text)["lineage"]["step"] == 5


@pytest.mark.parametrize(
    ("method", "request_", "more", "code", "message"),
    [
        ("Score", pb.ScoreRequest(sequences=["M"]), {"key": "no"}, "UNAUTHENTICATED", "API key"),
        ("Embed", pb.EmbedRequest(sequences=["M1"]), {}, "INVALID_ARGUMENT", "position 2"),
        ("Embed", pb.EmbedRequest(), {}, "INVALID_ARGUMENT", "at least one"),
        ("Embed", pb.EmbedRequest(sequences=["M"], pooling="x"), {}, "INVALID_ARGUMENT", "one of"),
        ("Scan", pb.ScanRequest(sequence="MK", model="no"), {}, "NOT_FOUND", "serves 'raptide'"),
        (
            "Score",
            pb.ScoreRequest(sequences=["A" * 300]),
            {"x_raptide_timeout_s": "0.05"},
            "DEADLINE_EXCEEDED",
            "0.05 s",
        ),
        (
            "Embed",
            pb.EmbedRequest(sequences=["MK"]),
            {"x_raptide_timeout_s": "nan"},
            "INVALID_ARGUMENT",
            "above 0, but 'nan'",
        ),
        (
            "Embed",
            pb.EmbedRequest(sequences=["MK"], layers=[2, -1]),
            {},
            "INVALID_ARGUMENT",
            "2 and -1 are the same",
        ),
        (
            "Logits",
            pb.LogitsRequest(sequences=["MK"], masked_positions=[pb.Positions(positions=[3])]),
            {},
            "INVALID_ARGUMENT",
            "from 1 to 2 of sequence 0",
        ),
        (
            "Embed",
            pb.EmbedRequest(sequences=["A" * 400] * 300),
            {},
            "INVALID_ARGUMENT",
            "at most 100,000 bytes",
        ),
    ],
)
def test_errors_have_a_status_and_one_sentence(call, method, request_, more, code, message):
    with pytest.raises(grpc.RpcError) as caught:
        call(method, request_, **more)
    assert caught.value.code().name == code
    assert message in caught.value.details()
    assert "Traceback" not in caught.value.details()


def test_the_rpcs_own_deadline_ends_what_it_has_begun(client, proxy):
    """More than the queue holds is asked for and given up, again and again."""
    metadata = [("application", "raptide"), ("authorization", f"Bearer {proxy.key}")]
    request = pb.ScoreRequest(sequences=["A" * 250])
    with grpc.insecure_channel(proxy.grpc) as channel:
        score = RaptideStub(channel).Score
        for _ in range(6):
            with pytest.raises(grpc.RpcError) as caught:
                score(request, metadata=metadata, timeout=0.05)
            assert caught.value.code().name == "DEADLINE_EXCEEDED"
        time.sleep(0.5)
        assert len(score(request, metadata=metadata, timeout=60).scores) == 1


def test_a_model_without_a_language_model_head_says_so(proxy, keyed):
    metadata = [("application", "keyed"), ("authorization", f"Bearer {keyed.keys['lab']}")]
    with grpc.insecure_channel(proxy.grpc) as channel:
        stub = RaptideStub(channel)
        request = pb.EmbedRequest(sequences=SEQUENCES, model="tuned")
        assert len(arrays(stub.Embed(request, metadata=metadata, timeout=60))) == len(SEQUENCES)
        for method, request in (
            ("Logits", pb.LogitsRequest(sequences=SEQUENCES, model="tuned")),
            ("Scan", pb.ScanRequest(sequence="MKTA", model="tuned")),
            ("Score", pb.ScoreRequest(sequences=SEQUENCES, model="tuned")),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                list(getattr(stub, method)(request, metadata=metadata, timeout=60))
            assert caught.value.code().name == "INVALID_ARGUMENT"
            assert "no language-model head" in caught.value.details()
