"""While two versions are up, each request is answered by one of them."""

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest
from endpoints import make_bundle
from in_one_process import Context, Endpoint, Handle, at_random, in_turn
from ray.serve._private.common import DeploymentHandleSource, DeploymentID
from ray.serve.request_router import PendingRequest

from raptide.inference.engine import Engine
from serve.calls import Ask, Work
from serve.gateway import dispatch
from serve.gateway.routing import TokenRouter
from serve.replica.deployment import Replica
from serve.rpc import raptide_pb2 as pb
from serve.settings import ModelSettings

SEQUENCES = ["MKTAYIAKQRLAGVSERTID" + letter * 5 for letter in "LAGVSERT"]
RUN = 32
"""Tokens of a batch, so that each sequence is a run."""


@pytest.fixture(scope="module")
def versions(tmp_path_factory):
    """Two bundles by the digest of their weights, each with a replica and an engine."""
    folder = tmp_path_factory.mktemp("versions")

    async def start(settings):
        return Replica(settings)

    found = []
    for step in (1, 2):
        path = make_bundle(folder / str(step), seed=step, step=step)
        settings = ModelSettings(name="raptide", path=str(path), max_batch_tokens=RUN)
        replica = asyncio.run(start(settings))
        expected = Engine.load(path).embed(SEQUENCES)
        found.append(SimpleNamespace(replica=replica, weights=replica._weights, expected=expected))
    return found


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(dispatch, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(dispatch, "LONGEST_PAUSE_S", 0.01)


def endpoint(handle, **settings):
    return Endpoint(
        handle, ModelSettings(name="raptide", path="", max_batch_tokens=RUN), **settings
    )


def both(versions, choose, **more):
    return Handle([version.replica for version in versions], choose, **more)


@pytest.mark.parametrize("how", ["json", "arrow", "grpc"])
@pytest.mark.parametrize(("choose", "times"), [(in_turn(), 20), (at_random(7), 40)])
def test_a_request_of_eight_runs_is_answered_by_one_version(versions, how, choose, times):
    handle = both(versions, choose)

    async def main():
        served = endpoint(handle)
        return [await served.embed(how, SEQUENCES) for _ in range(times)]

    answers = asyncio.run(main())
    assert {weights for weights, _ in answers} == {version.weights for version in versions}
    by_digest = {version.weights: version.expected for version in versions}
    for weights, vectors in answers:
        np.testing.assert_allclose(vectors, by_digest[weights], atol=1e-5)
    assert len(handle.works) == 8 * times, "nothing was asked for twice"


def vanishing(versions):
    """The first version answers, until it goes away after three runs."""
    handle = both(versions, lambda replicas: replicas[0])

    def after(sent):
        if sent == 3:
            del handle.replicas[0]

    handle._on_sent = after
    return handle


def test_when_its_version_goes_away_a_request_starts_over_with_the_new_one(versions):
    async def main():
        return await endpoint(vanishing(versions)).embed("json", SEQUENCES)

    weights, vectors = asyncio.run(main())
    assert weights == versions[1].weights
    np.testing.assert_allclose(vectors, versions[1].expected, atol=1e-5)


def test_a_stream_whose_version_goes_away_breaks_off_with_an_error(versions):
    async def by_arrow():
        await endpoint(vanishing(versions)).embed("arrow", SEQUENCES)

    with pytest.raises(RuntimeError, match="broke off"):
        asyncio.run(by_arrow())

    context, parts = Context({}), []

    async def by_grpc():
        request = pb.EmbedRequest(sequences=SEQUENCES)
        async for part in endpoint(vanishing(versions)).rpc.Embed(request, context):
            parts.append(part)

    asyncio.run(by_grpc())
    assert context.code.name == "UNAVAILABLE"
    assert "updated while its answer was on its way" in context.details
    assert {part.source.weights for part in parts if part.arrays} == {versions[0].weights}


@pytest.mark.parametrize("how", ["json", "arrow", "grpc"])
def test_a_client_may_pin_a_version(versions, how):
    async def main():
        served = endpoint(both(versions, in_turn()))
        return [
            await served.embed(how, given, X_Raptide_Weights=version.weights)
            for version in versions
            for given in (SEQUENCES, SEQUENCES[:1])
        ]

    found = [weights for weights, _ in asyncio.run(main())]
    assert found == [version.weights for version in versions for _ in range(2)]


def test_a_pinned_version_that_has_gone_is_told_in_a_sentence(versions):
    first, second = versions

    async def main():
        served = endpoint(Handle([second.replica], in_turn()))
        answer = await served.http(
            "/v1/embeddings", {"input": SEQUENCES}, X_Raptide_Weights=first.weights
        )
        context = Context({"X-Raptide-Weights": first.weights})
        request = pb.EmbedRequest(sequences=SEQUENCES)
        assert [part.arrays async for part in served.rpc.Embed(request, context)] == [[]]
        bad = await served.http("/v1/embeddings", {"input": "MK"}, X_Raptide_Weights="newest")
        return answer, context, bad

    answer, context, bad = asyncio.run(main())
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (410, "gone")
    assert error["message"] == (
        f"Weights {first.weights} are not served any more, {second.weights} are; ask for those, or "
        "leave X-Raptide-Weights out."
    )
    assert (context.code.name, context.details) == ("FAILED_PRECONDITION", error["message"])
    assert bad.status_code == 422
    assert "16 hex digits" in bad.json()["error"]["message"]


def running(name, weights):
    async def queue_length(*, deadline_s):
        return 0

    return SimpleNamespace(
        replica_id=name,
        replica_metadata={"weights": weights},
        max_ongoing_requests=9,
        get_queue_len=queue_length,
    )


def test_the_router_keeps_to_the_version_also_while_its_replicas_leave(cluster):
    old, new = running("old", "a"), running("new", "b")

    def pending(weights):
        work = Work(Ask("embed"), ["M"], 3, timeout_s=1.0, weights=weights)
        return PendingRequest(args=[work], kwargs={}, metadata=SimpleNamespace())

    async def main():
        router = TokenRouter(DeploymentID("replica"), DeploymentHandleSource.REPLICA)

        async def able(weights):
            candidates = list(router.curr_replicas.values())
            ranks = await router.choose_replicas(candidates, pending(weights))
            return {replica.replica_id for (replica,) in ranks}

        router.update_replicas([old, new])
        assert [await able(weights) for weights in ("", "a", "b")] == [
            {"old", "new"},
            {"old"},
            {"new"},
        ]
        router.update_replicas([new])
        assert [await able(weights) for weights in ("", "a", "b")] == [{"new"}, {"old"}, {"new"}]
        assert await router._select_from_candidate_replicas([old], 0) is old
        router.on_replica_actor_died("old")
        assert await able("a") == {"new"}, "it refuses, and says what it has"

    asyncio.run(main())
