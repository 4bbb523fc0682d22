"""A replica by itself, without Serve."""

import asyncio
import threading
from types import SimpleNamespace

import pytest
import ray
import torch

from raptide.errors import ConfigError
from raptide.inference.engine import Engine
from raptide.model.families import make_model
from raptide.model.formats.detect import write_weights
from raptide.model.formats.weights import Weights
from raptide.model.lstm.config import LstmSettings
from serve.calls import Ask, Done, Refused, Work
from serve.replica import deployment
from serve.replica.deployment import Replica, device_given, warm_up
from serve.settings import ModelSettings


def test_of_threads_that_computed_only_the_batchers_stays(bundle):
    before = set(threading.enumerate())

    async def names_after_a_probe():
        replica = Replica(ModelSettings(name="alone", path=str(bundle)))
        await replica.check_health()
        for _ in range(500):
            new = {each.name for each in set(threading.enumerate()) - before}
            # Lanes of one thread form no team.
            names = [name for name in new if not name.startswith("raptide-lane")]
            if len(names) == 1:
                break
            await asyncio.sleep(0.01)
        return names

    assert asyncio.run(names_after_a_probe()) == ["batcher"]


def test_who_asks_during_a_probe_waits_for_its_answer(bundle):
    before = set(threading.enumerate())

    async def threads_of_many_probes():
        replica = Replica(ModelSettings(name="alone", path=str(bundle)))
        probes = [asyncio.ensure_future(replica.probe()) for _ in range(50)]
        await asyncio.sleep(0)
        started = len(set(threading.enumerate()) - before)
        probes[0].cancel()
        assert await asyncio.gather(*probes[1:]) == [None] * 49
        return started

    assert asyncio.run(threads_of_many_probes()) <= 3  # the batcher's, the probe's, one that ends


def test_an_lstm_refuses_masks_and_answers_in_one_pass(tmp_path):
    model = make_model(LstmSettings(layers=1, width=16)).initialise(1)
    write_weights(tmp_path / "lstm", Weights.of(model))

    async def last_of(work):
        replica = Replica(ModelSettings(name="alone", path=str(tmp_path / "lstm")))
        return [each async for each in replica.run(work)][-1]

    def answer(method):
        return asyncio.run(last_of(Work(Ask("score", method), ["MKTAYI"], 8, 60.0)))

    assert isinstance(answer("one-pass"), Done)
    refused = answer("pseudo-ppl")
    assert isinstance(refused, Refused)
    assert refused.reason == "model"
    assert "an LSTM does not read" in refused.message


@pytest.fixture
def ray_gave(monkeypatch):
    """Let Ray have given this process these GPUs, on a machine that has some."""

    def give(*ids, seen=True):
        context = SimpleNamespace(get_accelerator_ids=lambda: {"GPU": list(ids), "TPU": []})
        monkeypatch.setattr(ray, "is_initialized", lambda: True)
        monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: seen)

    return give


def test_the_device_is_what_ray_gave(bundle, ray_gave, monkeypatch):
    asked = []
    load = Engine.load

    def spy(path, *, device="auto", **options):
        asked.append(device)
        return load(path, device="cpu", **options)

    monkeypatch.setattr(Engine, "load", spy)
    for ids, device in (((), "cpu"), (("3",), "cuda")):
        ray_gave(*ids)
        Replica(ModelSettings(name="alone", path=str(bundle)))
        assert asked.pop() == device


def test_a_gpu_that_torch_does_not_see_is_an_error_and_no_silent_cpu(ray_gave):
    ray_gave("0", seen=False)
    with pytest.raises(ConfigError, match=r"Ray gave GPU 0, but PyTorch sees none"):
        device_given()


class Recorder:
    """An engine that says the tokens of each pass."""

    def __init__(self, engine):
        self.model, self.max_residues = engine.model, engine.max_residues
        self.max_batch_tokens, self.lanes = 300, 1
        self.passes = []

    def logits(self, sequences):
        self.passes.append(sum(len(sequence) + 2 for sequence in sequences))

    def contacts(self, sequences):
        self.passes.append("contacts")


def test_before_traffic_every_size_of_batch_is_computed_once_in_bounded_time(engine, monkeypatch):
    recorder = Recorder(engine)
    warm_up(recorder)
    assert recorder.passes == [16, 64, 128, 256, "contacts"]
    recorder = Recorder(engine)
    recorder.lanes = 4
    warm_up(recorder)
    *sizes, many, contacts = recorder.passes
    assert (sizes, contacts) == ([16, 64, 128, 256], "contacts")
    assert many >= 4 * 512, "and each lane has had the largest size"
    monkeypatch.setattr(deployment, "WARM_UP_S", 0.0)
    recorder = Recorder(engine)
    warm_up(recorder)
    assert recorder.passes == [16]


def test_a_replica_is_warm_before_it_is_there(bundle, monkeypatch):
    warmed = []
    monkeypatch.setattr(deployment, "warm_up", warmed.append)
    Replica(ModelSettings(name="alone", path=str(bundle)))
    assert [type(each) for each in warmed] == [Engine]
