"""Room for workers: on this machine, and on a cluster whose nodes are yet to come."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
import yaml
from conftest import ROOT
from draws import generator
from small_runs import as_recipe, make_recipe

from processes import free_port
from raptide.cluster import DATA_CPUS, training_cpus
from raptide.errors import ConfigError
from raptide.model.config import ModelSettings
from raptide.training.planning.room import (
    Nodes,
    Room,
    choose_device,
    room_by_config,
    worker_needs,
)

HEAD = Nodes(1, {"CPU": 16.0, "GPU": 0.0})
LARGE = Nodes(16, {"CPU": 96.0, "GPU": 8.0})


def recipe_for(workers, device="auto", **cluster):
    class NoCorpus:
        path = "corpora/none"

    return as_recipe(make_recipe(NoCorpus), workers=workers, device=device, **cluster)


@pytest.mark.parametrize(
    ("now", "most", "workers", "device"),
    [
        ((HEAD,), (HEAD, LARGE), 128, "cuda"),
        ((HEAD, LARGE), None, 128, "cuda"),
        ((HEAD,), (HEAD,), 14, "cpu"),
        ((HEAD,), (HEAD, LARGE), 129, "at most 17 nodes"),
        ((HEAD,), (HEAD,), 15, "room for 14 beside 2 CPUs"),
        ((HEAD,), None, 1, "what it may get is not known here; set cluster.device=cuda"),
        ((HEAD, Nodes(1, LARGE.resources)), None, 9, "set cluster.device=cuda"),
    ],
)
def test_auto_never_takes_cpus_where_gpus_are_or_may_come(now, most, workers, device):
    room = Room("the cluster", now, most, max_nodes=17)
    if device in ("cpu", "cuda"):
        assert choose_device(recipe_for(workers), room) == device
        return
    with pytest.raises(ConfigError, match=device):
        choose_device(recipe_for(workers), room)


@pytest.mark.parametrize(
    ("width", "heads", "precision", "device", "refused"),
    [
        (60, 5, "bf16", "auto", "heads of 12 values .model.width 60 over 5 heads."),
        (528, 2, "fp16", "cuda", "heads of 264 values"),
        (60, 5, "fp32", "cuda", None),
        (60, 5, "bf16", "cpu", None),
        (480, 20, "bf16", "cuda", None),
        (512, 2, "bf16", "auto", None),
    ],
)
def test_heads_that_the_kernel_cannot_take_are_refused_when_planned_for_gpus(
    width, heads, precision, device, refused
):
    recipe = recipe_for(1, device)
    recipe = recipe.model_copy(
        update={
            "model": ModelSettings(layers=1, width=width, heads=heads),
            "training": recipe.training.model_copy(update={"precision": precision}),
        }
    )
    room = Room("the cluster", (HEAD, LARGE), None)
    if refused is None:
        assert choose_device(recipe, room) == ("cuda" if device == "auto" else device)
        return
    with pytest.raises(ConfigError, match=f"{refused}.* multiples of 8 up to 256"):
        choose_device(recipe, room)


def test_what_is_not_known_is_waited_for_on_request():
    room = Room("the cluster", (HEAD,), None)
    assert choose_device(recipe_for(500, "cuda"), room) == "cuda"


def test_what_a_configuration_leaves_open_is_not_known():
    """On-premise clusters have nodes whose resources Ray finds out."""
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    assert room_by_config((HEAD,), config).fits_at_most({"CPU": 8.0, "GPU": 1.0}) == 128
    config["available_node_types"]["gpu"].pop("resources")
    assert room_by_config((HEAD,), config).most is None


def test_workers_fit_as_they_can_be_placed():
    for _ in range(200):
        rng = generator()
        kinds = tuple(
            Nodes(int(rng.integers(1, 4)), {"CPU": float(rng.integers(0, 9)), "x": 2.0})
            for _ in range(3)
        )
        cpus, max_nodes = int(rng.integers(1, 4)), int(rng.integers(1, 10))
        needs = worker_needs(
            recipe_for(1, "cpu", cpus_per_worker=cpus, worker_resources={"x": 1.0}), "cpu"
        )
        nodes = sorted((n.resources["CPU"] for n in kinds for _ in range(n.count)), reverse=True)
        taken = nodes[:max_nodes]
        placed = sum(min(int(each // cpus), 2) for each in taken)
        room = Room("the cluster", (), kinds, max_nodes)
        found = room.fits_at_most(needs)
        assert found <= placed
        if sum(taken) >= placed * cpus + DATA_CPUS + max(taken) * max_nodes:
            assert found == placed


def test_this_machine_has_room_for_two_workers_a_core(corpus, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(make_recipe(corpus)))
    most = training_cpus(None) - DATA_CPUS
    assert most == 2 * os.cpu_count()
    options = ["--config", file, "--output", tmp_path / "run", "cluster.device=cpu", "--dry-run"]
    done = dry_run(*options, f"cluster.workers=[1,{most + 1}]", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for size in ("cluster.workers=5000", f"cluster.workers={most + 1}"):
        cpus = "cluster.cpus_per_worker=" + ("64" if "5000" in size else "1")
        done = dry_run(*options, size, cpus, cwd=tmp_path)
        assert done.returncode == 2
        assert "but this machine has 1 node of" in done.stderr
        assert "lower cluster.workers or cluster.cpus_per_worker" in done.stderr


def dry_run(*options, cwd, **environment):
    command = [sys.executable, ROOT / "jobs/pretrain_model.py", *options]
    return subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def our_cluster(tmp_path):
    """The address of a head whose autoscaler has the node types of cluster.yaml.

    Not by ray.cluster_utils.AutoscalingCluster: it stops every Ray of this machine first, and
    reads a file that Ray's wheels do not have.
    """
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    head, config["head_node_type"] = config["head_node_type"], "ray.head.default"
    types = config["available_node_types"]
    types["ray.head.default"] = types.pop(head) | {"max_workers": 0}
    for kind in types.values():
        kind |= {"node_config": {}, "min_workers": 0}
    steps = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray")
    config |= {f"{step}_commands": [] for step in (*steps, "worker_start_ray")}
    config |= {"provider": {"type": "fake_multinode"}, "auth": {}, "docker": {}, "file_mounts": {}}
    config |= {"cluster_synced_files": [], "file_mounts_sync_continuously": False}
    file = tmp_path / "autoscaler.yaml"
    file.write_text(yaml.safe_dump(config))
    port = free_port()
    command = [f"{sys.prefix}/bin/ray", "start", "--head", "--block", f"--port={port}"]
    command += ["--num-cpus=16", "--include-dashboard=false", "--disable-usage-stats"]
    with (tmp_path / "ray.log").open("w") as log:
        process = subprocess.Popen(
            [*command, f"--autoscaling-config={file}"],
            env=os.environ | {"RAY_FAKE_CLUSTER": "1"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    deadline = time.monotonic() + 120
    while "block forever" not in (log := (tmp_path / "ray.log").read_text()):
        assert process.poll() is None, log
        assert time.monotonic() < deadline, log
        time.sleep(0.2)
    yield re.search(r"--address='([^']+)'", log)[1]  # Ray colours its output
    process.send_signal(signal.SIGTERM)
    process.wait(30)


@pytest.mark.thorough
def test_a_dry_run_on_our_cluster_finds_the_gpus_that_may_come(corpus, our_cluster, tmp_path):
    recipe = make_recipe(corpus)
    recipe["cluster"] = {"workers": [8, 128], "cpus_per_worker": 8}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    options = ["--config", file, "--output", tmp_path / "run", "--dry-run"]
    done = dry_run(*options, cwd=tmp_path, RAY_ADDRESS=our_cluster)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the cluster has 1 node of 16 CPUs, 0 GPUs" in done.stdout
    assert (
        "may have at most 17 nodes: 16 nodes of 96 CPUs, 8 GPUs; 1 node of 16 CPUs" in done.stdout
    )
    assert "workers on cuda with 8 CPU, 1 GPU each: 0 fit now, 128 at most" in done.stdout
    assert "lacks room for 8 workers, to be waited for" in done.stdout
    done = dry_run(*options, "cluster.workers=129", cwd=tmp_path, RAY_ADDRESS=our_cluster)
    assert done.returncode == 2
    assert "cluster.workers 129, one GPU each, but the cluster has 1 node of 16" in done.stderr
