"""Replicas die and checkpoints change under load, and no client sees it."""

import os
import shutil
import signal

import pytest
import torch
from client_load import ClientLoad
from endpoints import make_bundle
from ray import serve as ray_serve
from safetensors.torch import load_file, save_file
from steady_load import KINDS, SteadyLoad, by_kind

from raptide.errors import BundleError
from serve.app import build
from serve.replica.deployment import Replica
from serve.settings import ModelSettings


@pytest.fixture(scope="module")
def deploy(proxy):
    """Deploy a bundle under the same name; returns the address."""

    def run(path):
        arguments = {"model": str(path), "replicas": 2, "cpus_per_replica": 0.5}
        arguments["max_batch_tokens"] = 64  # so that each protein of a request is a run
        arguments["keys_file"] = str(proxy.keys_file)
        ray_serve.run(build(arguments), name="updates", route_prefix="/updates")
        return f"{proxy.url}/updates"

    yield run
    ray_serve.delete("updates", _blocking=False)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles")
    return {step: make_bundle(folder / str(step), seed=step, step=step) for step in (1, 2)}


@pytest.fixture(scope="module")
def url(deploy, bundles, tmp_path_factory):
    """Where the first of them is served, whose files were pruned."""
    model = shutil.copytree(bundles[1], tmp_path_factory.mktemp("run") / "step-1/model")
    url = deploy(model)
    shutil.rmtree(model.parent)
    return url


def every_kind(url, proxy):
    """Clients that ask for 1, 3, 8 and 64 runs, as JSON, as Arrow and by gRPC, and leave replicas
    that start some of the cores."""
    where = {"grpc": proxy.grpc, "application": "updates", **proxy.headers}
    return SteadyLoad(url, kinds=KINDS, pause_s=0.1, **where)


def test_killed_replicas_cost_no_request_and_come_back_though_their_files_were_pruned(url, proxy):
    handle = ray_serve.get_deployment_handle("replica-raptide", "updates")
    with every_kind(url, proxy) as load:
        for _ in range(3):  # of two replicas
            os.kill(handle.process.remote().result()["pid"], signal.SIGKILL)
            load.wait_for_more(40)
    assert not load.failed, by_kind(load.answers)


def test_a_new_checkpoint_comes_without_a_failed_request(url, deploy, bundles, proxy):
    with ClientLoad(url, proxy.key, pause_s=0.3) as clients, every_kind(url, proxy) as load:
        load.wait_for_more(20)
        deploy(bundles[2])
        load.wait_for(lambda answers: {told.step for told in answers[-8:]} == {"2"})
    assert not load.failed, by_kind(load.answers)
    assert {told.kind for told in load.answers} == {str(kind) for kind in KINDS}
    assert clients.calls
    assert not clients.failed
    assert clients.mixed == 0, "a call of many requests has met two models"
    versions = {(told.step, told.weights) for told in load.answers}
    assert len(versions) == 2, "no answer is of two versions"


def test_a_replica_does_not_start_with_weights_that_answer_otherwise(tmp_path):
    """So Serve never sends it a request, and an update to it leaves the old ones serving."""
    bad = make_bundle(tmp_path / "bad", seed=3)
    tensors = load_file(bad / "model.safetensors")
    damaged = {name: torch.roll(tensor, 1, 0) for name, tensor in tensors.items()}
    save_file(damaged, bad / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BundleError, match="otherwise than its record"):
        Replica(ModelSettings(name="bad", path=str(bad)))
