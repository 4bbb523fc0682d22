"""An endpoint on a cluster of three nodes grows under load and shrinks after it.

    python tests/chaos/serve_scale.py --json scale.json

The nodes are Ray's own on this machine (`ray.cluster_utils.Cluster`), with room for a replica each.
Prints every change in the number of replicas, how the tokens were shared among them, and what each
weighs: their weights are mapped from one file, so a second replica adds little (fp32, 35 M shape).
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import httpx
import ray
from ray import serve as ray_serve
from ray.cluster_utils import Cluster
from serve_chaos import say

from processes import free_port, no_orphans
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
                raise RuntimeError(f"{replicas} replicas were wanted, but {self.seen} came.")
            time.sleep(0.2)
        return round(time.monotonic() - started, 1)

    def stop(self) -> None:
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

    def stop(self) -> None:
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    with no_orphans(), tempfile.TemporaryDirectory() as folder:
        model = Esm(ModelSettings(layers=12, width=480, heads=20)).initialise(1)
        write_weights(folder, Weights.of(model))
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        for _ in range(MAX_REPLICAS - 1):
            cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False)
        report = scale(Path(folder))
        ray_serve.shutdown()
        ray.shutdown()
        cluster.shutdown()
    print(json.dumps(report, indent=1))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


def scale(model: Path) -> dict[str, Any]:
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
    watch = Watch()
    watch.wait_for(1, 60)
    alone = replicas_of(handle, 1)
    say("load begins")
    load = Mixed(f"http://127.0.0.1:{port}", clients=12)
    grown_s = watch.wait_for(MAX_REPLICAS, GROW_S)
    before = {one["pid"]: one["computed_tokens"] for one in replicas_of(handle, MAX_REPLICAS)}
    time.sleep(30)
    after = replicas_of(handle, MAX_REPLICAS)
    shares = [one["computed_tokens"] - before.get(one["pid"], 0) for one in after]
    load.stop()
    say("load ends")
    shrunk_s = watch.wait_for(1, SHRINK_S)
    watch.stop()
    return {
        "replicas": watch.seen,
        "grown_s": grown_s,
        "shrunk_s": shrunk_s,
        "statuses": load.statuses,
        "nodes": len({one["node"] for one in after}),
        "tokens_in_30_s": shares,
        "alone_mb": _megabytes(alone),
        "together_mb": _megabytes(after),
        "weights_mb": round((model / "model.safetensors").stat().st_size / 1e6),
    }


def _megabytes(replicas: list[dict[str, Any]]) -> list[dict[str, int]]:
    kinds = ("uss_bytes", "pss_bytes")
    return [{kind[:3]: round(one[kind] / 1e6) for kind in kinds} for one in replicas]


if __name__ == "__main__":
    main()
