"""The endpoint of serve_scale.py, its load, and how many replicas it has."""

from __future__ import annotations

import argparse
import random
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import httpx
import ray
from by_hand import Report
from ray import serve as ray_serve
from ray.cluster_utils import Cluster
from steady_load import say

from processes import free_port
from raptide import RaptideError
from raptide.model.config import ModelSettings
from raptide.model.formats.detect import write_weights
from raptide.model.formats.weights import Weights
from raptide.model.transformer import Esm
from serve.app import build

MAX_REPLICAS = 3
GROW_S, SHRINK_S = 240.0, 180.0


class Watch:
    """Notes whenever the number of running replicas changes."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.seen: list[tuple[float, int]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._stop.wait(0.5):
            application = ray_serve.status().applications["scale"]
            states = application.deployments["replica-raptide"].replica_states
            running = {str(key): value for key, value in states.items()}.get("RUNNING", 0)
            if not self.seen or self.seen[-1][1] != running:
                self.seen.append((round(time.monotonic() - self.started, 1), running))
                say(f"{running} replicas run")

    def wait_for(self, replicas: int, seconds: float) -> float:
        """Seconds until so many run."""
        started = time.monotonic()
        while not self.seen or self.seen[-1][1] != replicas:
            if time.monotonic() - started > seconds:
                raise RaptideError(
                    f"{replicas} replicas were wanted within {seconds:.0f} s, and {self.seen} came."
                )
            time.sleep(0.2)
        return round(time.monotonic() - started, 1)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()


class Mixed:
    """Clients whose requests differ hundredfold in tokens."""

    def __init__(self, url: str, clients: int) -> None:
        self._url = url
        self._stop = threading.Event()
        self.statuses: dict[int, int] = {}
        self._threads = [threading.Thread(target=self._ask, args=(n,)) for n in range(clients)]
        for thread in self._threads:
            thread.start()

    def _ask(self, seed: int) -> None:
        rng = random.Random(seed)
        with httpx.Client(base_url=self._url, timeout=300.0) as client:
            while not self._stop.is_set():
                count, length = rng.choice([(1, 30), (1, 300), (20, 150)])
                body = {"input": ["MKTAYIAKQR" * (length // 10)] * count}
                status = client.post("/v1/embeddings", json=body).status_code
                self.statuses[status] = self.statuses.get(status, 0) + 1

    def close(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def replicas_of(handle: Any, count: int) -> list[dict[str, Any]]:
    """What each of `count` replicas says of itself."""
    found: dict[int, dict[str, Any]] = {}
    for _ in range(200):
        one = handle.process.remote().result()
        found[one["pid"]] = one
        if len(found) >= count:
            break
    return list(found.values())


def scale(model: Path, args: argparse.Namespace, report: Report) -> None:
    write_weights(model, Weights.of(Esm(ModelSettings(preset="esm2_t12_35M")).initialise(1)))
    report["weights_mb"] = round((model / "model.safetensors").stat().st_size / 1e6)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        for _ in range(MAX_REPLICAS - 1):
            cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False)
        grow_and_shrink(model, args.seconds, report)
    finally:
        ray_serve.shutdown()
        ray.shutdown()
        cluster.shutdown()


def grow_and_shrink(model: Path, seconds: float, report: Report) -> None:
    """More replicas under load, which share it; one after it."""
    port = free_port()
    ray_serve.start(http_options={"host": "127.0.0.1", "port": port})
    arguments = {
        "model": str(model),
        "dtype": "fp32",
        "max_replicas": MAX_REPLICAS,
        "target_tokens_per_replica": 4000,
        "upscale_delay_s": 2,
        "downscale_delay_s": 10,
        "timeout_s": 300,
    }
    ray_serve.run(build(arguments), name="scale")
    handle = ray_serve.get_deployment_handle("replica-raptide", "scale")
    with closing(Watch()) as watch:
        report["replicas"] = watch.seen
        with report.part("one replica"):
            watch.wait_for(1, 60)
            report["alone_mb"] = _megabytes(replicas_of(handle, 1))
        say("load begins")
        with closing(Mixed(f"http://127.0.0.1:{port}", clients=12)) as load:
            report["statuses"] = load.statuses
            with report.part("growing"):
                report["grown_s"] = watch.wait_for(MAX_REPLICAS, GROW_S)
            with report.part("sharing"):
                report |= share(handle, seconds)
        say("load ends")
        with report.part("shrinking"):
            report["shrunk_s"] = watch.wait_for(1, SHRINK_S)


def share(handle: Any, seconds: float) -> dict[str, Any]:
    """What each of all replicas computes in some seconds, and what it weighs."""
    before = {one["pid"]: one["computed_tokens"] for one in replicas_of(handle, MAX_REPLICAS)}
    time.sleep(seconds)
    after = replicas_of(handle, MAX_REPLICAS)
    return {
        "nodes": len({one["node"] for one in after}),
        "seconds": seconds,
        "tokens": [one["computed_tokens"] - before.get(one["pid"], 0) for one in after],
        "together_mb": _megabytes(after),
    }


def _megabytes(replicas: list[dict[str, Any]]) -> list[dict[str, int]]:
    kinds = ("uss_bytes", "pss_bytes")
    return [{kind[:3]: round(one[kind] / 1e6) for kind in kinds} for one in replicas]
