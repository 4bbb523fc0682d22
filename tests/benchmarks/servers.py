"""Embedding servers as processes of their own, on free loopback ports, for bench_serving.py."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
from machine import CORES

from raptide import RaptideError

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.append(str(ROOT / "jobs"))

from processes import free_port  # noqa: E402

INFINITY = ("infinity-emb[torch,server]==0.0.78", "transformers<5")
"""What was seen to serve ESM-2 folders."""

READY_S = 240.0
STOP_S = 60.0

ROLES = {
    "proxy": ("ProxyActor", "HAProxyManager", "haproxy"),
    "gateway": ("ServeReplica:raptide:Gateway",),
    "engine": ("ServeReplica:raptide:",),
}
"""How Raptide's processes are called, as their command lines begin; the first that fits counts."""


class Server:
    """A server that answers at `url`."""

    def __init__(
        self, name: str, url: str, process: psutil.Process, key: str | None = None
    ) -> None:
        self.name = name
        self.url = url
        self.key = key
        self._process = process

    def cpu_s(self) -> dict[str, float]:
        """CPU seconds so far, by role; "other" is Ray itself, or a server of one process."""
        return self._by_role(lambda process: sum(process.cpu_times()[:2]))

    def memory_mb(self) -> dict[str, float]:
        """Memory of its own (without shared pages), by role."""
        return self._by_role(lambda process: process.memory_full_info().uss / 1e6)

    def _by_role(self, measure: Any) -> dict[str, float]:
        found: dict[str, float] = {}
        for process in [self._process, *self._process.children(recursive=True)]:
            try:
                # Ray's processes rename themselves: "ray::ServeReplica:raptide:Gateway".
                command = " ".join(process.cmdline()[:1]).rsplit("/", 1)[-1]
                value = measure(process)
            except psutil.NoSuchProcess:
                continue
            role = next((r for r, names in ROLES.items() if any(n in command for n in names)), None)
            found[role or "other"] = found.get(role or "other", 0.0) + value
        return found


@contextmanager
def raptide_server(
    model: Path,
    scratch: Path,
    *,
    replicas: int = 1,
    haproxy: str | None = None,
) -> Iterator[Server]:
    """`python -m serve`, cores shared by the replicas; `haproxy`: a binary, for HAProxy mode."""
    port, key = free_port(), secrets.token_hex(32)
    application = {
        "name": "raptide",
        "route_prefix": "/",
        "import_path": "serve.app:build",
        "args": {
            "model": str(model),
            "replicas": replicas,
            "cpus_per_replica": CORES / replicas,
        },
    }
    config = {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [application],
    }
    file = scratch / f"serve-{port}.yaml"
    file.write_text(json.dumps(config))  # YAML reads JSON
    env = {
        "RAY_ADDRESS": "local",
        "PYTHONPATH": str(ROOT),
        "RAPTIDE_API_KEYS": f"bench sha256:{hashlib.sha256(key.encode()).hexdigest()}",
    }
    name = "raptide"
    command = [sys.executable, "-m", "serve", str(file)]
    # Serve adds the node's id of 56 letters, and a socket's path may have 97.
    with tempfile.TemporaryDirectory(prefix="hp") as place:
        if haproxy is not None:
            name = "raptide, HAProxy"
            env |= _haproxy_settings(haproxy, place)
        with _serving(name, command, port, scratch, "/readyz", env, key) as server:
            yield server


def _haproxy_settings(binary: str, folder: str) -> dict[str, str]:
    """Serve's HAProxy mode, with files and ports of its own."""
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": binary,
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{folder}/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{folder}/admin.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": folder,
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{folder}/server-state",
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_NBTHREAD": str(CORES),
    }


@contextmanager
def plain_server(model: Path, scratch: Path, *options: str) -> Iterator[Server]:
    port = free_port()
    command = [sys.executable, str(HERE / "plain_server.py"), str(model), str(port), *options]
    name = "FastAPI, one at a time" if options else "FastAPI"
    # It computes in many threads: a quarter faster if those that wait for others sleep.
    env = {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    with _serving(name, command, port, scratch, "/v1/models", env) as server:
        yield server


@contextmanager
def infinity_server(folder: Path, model: Path, scratch: Path) -> Iterator[Server]:
    """infinity-emb out of a virtual environment, fp32, batches of 32."""
    port = free_port()
    command = [
        *(str(folder / "bin/infinity_emb"), "v2", "--model-id", str(model)),
        *("--served-model-name", "infinity", "--host", "127.0.0.1", "--port", str(port)),
        *("--device", "cpu", "--engine", "torch", "--dtype", "float32", "--batch-size", "32"),
        # Its warm-up does not know tokenizers without a fast version, such as ESM's.
        *("--no-bettertransformer", "--no-model-warmup", "--url-prefix", "/v1"),
    ]
    env = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
    with _serving("infinity", command, port, scratch, "/v1/models", env) as server:
        yield server


def install_infinity(folder: Path) -> str | None:
    """Install infinity-emb with this torch into `folder`; returns why it cannot be, or None."""
    import torch

    if (folder / "bin/infinity_emb").exists():
        return None
    venv.create(folder, with_pip=True)
    wanted = [*INFINITY, f"torch=={torch.__version__.split('+')[0]}"]
    done = subprocess.run(
        [folder / "bin/python", "-m", "pip", "install", "--quiet", *wanted],
        capture_output=True,
        text=True,
    )
    return None if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def find_haproxy() -> str | None:
    return shutil.which("haproxy", path=f"{os.environ['PATH']}:/usr/sbin")


class EngineAlone:
    """The bare engine in another process."""

    def __init__(self, model: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, HERE / "engine_alone.py", model],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._read()

    def embed(self, sequences: list[str]) -> float:
        """Seconds of one call."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(sequences) + "\n")
        self._process.stdin.flush()
        return self._read()

    def cpu_s(self) -> float:
        """CPU seconds so far."""
        return sum(psutil.Process(self._process.pid).cpu_times()[:2])

    def __enter__(self) -> EngineAlone:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RaptideError(f"The engine ended with code {self._process.wait()}.")
        return json.loads(line)


@contextmanager
def _serving(
    name: str,
    command: list[str],
    port: int,
    scratch: Path,
    ready: str,
    env: dict[str, str],
    key: str | None = None,
) -> Iterator[Server]:
    log = scratch / f"{name.replace(', ', '-').replace(' ', '-')}-{port}.log"
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            env=os.environ | env,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + READY_S
        while not _answers(url + ready):
            if process.poll() is not None or time.monotonic() > deadline:
                last = log.read_text(errors="replace").strip().splitlines()[-15:] or ["no output"]
                print(*last[:-1], sep="\n", flush=True)
                raise RaptideError(f"{name} does not start: {last[-1]}")
            time.sleep(0.5)
        yield Server(name, url, psutil.Process(process.pid), key)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=10.0).status_code == 200
    except httpx.TransportError:
        return False
