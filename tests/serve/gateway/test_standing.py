"""How models stand, with replicas that fail, hang, or are not there."""

import asyncio
import time

import pytest
from ray.serve.exceptions import DeploymentUnavailableError

from serve.gateway import standing
from serve.gateway.dispatch import Dispatcher
from serve.gateway.standing import Standing
from serve.settings import ModelSettings


def status(weights="w", queued=0):
    return {
        "node": "n",
        "weights": weights,
        "step": 5,
        "queued_tokens": queued,
        "pending_tokens": queued,
        "residues_per_s": 2.0,
        "model": {"width": 32, "weights": weights},
    }


class Broadcast:
    def __init__(self, answers):
        self._answers = answers

    async def results_async(self, timeout_s, return_exceptions):
        if not self._answers:
            raise DeploymentUnavailableError("m")
        return self._answers


class Handle:
    """A deployment whose replicas give these answers; `probe` takes `seconds`, or fails."""

    def __init__(self, answers, seconds=0.0, fails=False):
        self.answers, self.seconds, self.fails = answers, seconds, fails
        self.started, self.broadcasts = 0, 0
        self.probe = self

    def options(self, **options):
        return self

    def broadcast(self, method):
        assert method == "status"
        self.broadcasts += 1
        return Broadcast(self.answers)

    async def remote(self):
        """Routed as any request, so that it starts a replica where there is none."""
        self.started += not self.answers
        await asyncio.sleep(self.seconds)
        if self.fails:
            raise ZeroDivisionError


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(standing, "READY_S", 1.5)
    monkeypatch.setattr(standing, "GRACE_S", 0.1)


def models_of(**handles):
    """Models by name; those called `sleepy...` may have no replica."""
    scale = {"min_replicas": 0, "max_replicas": 1}
    settings = [
        ModelSettings(name=name, path="x", **(scale if name.startswith("sleepy") else {}))
        for name in handles
    ]
    dispatchers = {name: Dispatcher(handle, print) for name, handle in handles.items()}
    return Standing(settings, dispatchers)


def test_a_list_of_models_starts_none_and_fails_for_none():
    handles = {
        "good": Handle([status(), status()]),
        "sleepy": Handle([]),
        "gone": Handle([]),
        "broken": Handle([ZeroDivisionError()]),
    }
    models = asyncio.run(models_of(**handles).describe())
    assert [(model["id"], model["state"]) for model in models] == [
        ("good", "ready"),
        ("sleepy", "idle"),
        ("gone", "unavailable"),
        ("broken", "unavailable"),
    ]
    assert models[0]["width"] == 32
    assert not any(handle.started for handle in handles.values())


def test_what_a_model_said_is_still_told_once_it_sleeps(monkeypatch):
    monkeypatch.setattr(standing, "HOLDS_S", 0.0)
    handle = Handle([status()])

    async def twice():
        models = models_of(sleepy=handle)
        await models.describe()
        handle.answers = []
        return await models.describe()

    assert asyncio.run(twice()) == [{"id": "sleepy", "state": "idle", **status()["model"]}]


def test_the_status_adds_up_replicas_and_counts_versions():
    found = [status("old", 7), status("new", 5), status("new", 0)]
    (told,) = asyncio.run(models_of(m=Handle(found)).status())
    assert (told["queued_tokens"], told["residues_per_s"]) == (12, 6.0)
    assert told["versions"] == [
        {"weights": "new", "step": 5, "replicas": 2},
        {"weights": "old", "step": 5, "replicas": 1},
    ]
    assert len(told["replicas"]) == 3


@pytest.mark.parametrize(
    ("handles", "states", "serves"),
    [
        (
            {"a": Handle([status()]), "b": Handle([status()], fails=True)},
            {"a": "ready", "b": "unavailable"},
            True,
        ),
        (
            {"a": Handle([status()]), "b": Handle([status()], seconds=60), "sleepy": Handle([])},
            {"a": "ready", "b": "unavailable", "sleepy": "idle"},
            True,
        ),
        (
            {"a": Handle([status()], seconds=60), "sleepy": Handle([status()])},
            {"a": "unavailable", "sleepy": "ready"},
            False,
        ),
        ({"sleepy": Handle([])}, {"sleepy": "idle"}, True),
    ],
)
def test_one_model_that_is_not_ready_takes_no_other_out(handles, states, serves):
    began = time.monotonic()

    async def ask():
        models = models_of(**handles)
        found = await models.readiness()
        return found, models.serves(found)

    assert asyncio.run(ask()) == (states, serves)
    assert time.monotonic() - began < 30
    assert not any(handle.started for handle in handles.values())


def test_who_asks_at_once_shares_one_answer():
    handle = Handle([status()])

    async def many():
        models = models_of(m=handle)
        await asyncio.gather(*(models.status() for _ in range(50)))
        await models.describe()

    asyncio.run(many())
    assert handle.broadcasts == 1
