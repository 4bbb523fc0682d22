"""A Ray cluster of this machine as `ray start` makes one, with ports of its own."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import psutil

from processes import free_port

START_S = 180.0
TRIES = 3
BEAT_S = 0.1


class Node:
    """One raylet with all its processes, which are a process group of their own."""

    def __init__(self, process: subprocess.Popen) -> None:
        self._process = process

    def kill(self) -> None:
        """SIGKILL to everything that the node has started."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()

    def processes(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            node = psutil.Process(self._process.pid)
            return [node, *node.children(recursive=True)]
        return []

    @contextlib.contextmanager
    def slowed(self):
        """Within the block the node's workers stand still two thirds of the time."""
        ended = threading.Event()

        def beat() -> None:
            while not ended.is_set():
                self._signal(signal.SIGSTOP)
                ended.wait(2 * BEAT_S)
                self._signal(signal.SIGCONT)
                ended.wait(BEAT_S)

        thread = threading.Thread(target=beat)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _signal(self, number: int) -> None:
        for process in self.processes():
            with contextlib.suppress(psutil.Error, IndexError):
                if process.cmdline()[0].startswith("ray::"):
                    process.send_signal(number)


class Raylets:
    """A head and as many more nodes as are added."""

    def __init__(self, cpus: int, **env: str) -> None:
        """
        Args:
            cpus: of the head.
            env: joins the environment of every node.
        """
        self._folder = Path(tempfile.mkdtemp(prefix="rl-", dir="/tmp"))  # sockets' paths are short
        token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", self._folder / "token"))
        if not token.exists():
            token.write_text(secrets.token_hex(32))
        self.headers = {"Authorization": f"Bearer {token.read_text()}"}
        self.environment = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        self._env = self.environment | {
            # A node that is gone is known after some seconds.
            "RAY_health_check_initial_delay_ms": "1000",
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_failure_threshold": "6",
            "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
            "RAY_TRAIN_ENABLE_STATE_ACTOR_RECONCILIATION": "0",
            "WANDB_MODE": "offline",
            **env,
        }
        port, dashboard = free_port(), free_port()
        self.address, self.url = f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}"
        self.nodes: list[Node] = []
        try:
            self._start_head(cpus, port, dashboard)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Raylets:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start_head(self, cpus: int, port: int, dashboard: int) -> None:
        self._start(
            *("--head", f"--port={port}", f"--temp-dir={self._folder}"),
            *(f"--dashboard-port={dashboard}", "--include-dashboard=true"),
            cpus=cpus,
            env={},
        )

    def add(self, cpus: int, *, resources: str = "{}", **env: str) -> Node:
        """One more node.

        Args:
            resources: of its own, as JSON.
            env: joins its environment.
        """
        return self._start(
            f"--address={self.address}", f"--resources={resources}", cpus=cpus, env=env
        )

    def _start(self, *options: str, cpus: int, env: dict[str, str]) -> Node:
        """A node that has joined; on a busy machine `ray start` may give up before it has."""
        for _ in range(TRIES):
            name = f"node-{secrets.token_hex(4)}"
            process = self._start_process(name, *options, cpus=cpus, env=env)
            self.nodes.append(Node(process))
            if self._joins(name, process):
                return self.nodes[-1]
            self.nodes.pop().kill()
        log = (self._folder / f"{name}.log").read_text()
        raise RuntimeError(f"No node would start: {log[-1000:]}")

    def _joins(self, name: str, process: subprocess.Popen) -> bool:
        """Once a node is there, or has given up."""
        self._await(lambda: process.poll() is not None or name in self.alive())
        return process.poll() is None

    def _start_process(
        self, name: str, *options: str, cpus: int, env: dict[str, str]
    ) -> subprocess.Popen:
        ports = ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port")
        ports += ("runtime-env-agent-port", "node-manager-port", "object-manager-port")
        taken = [f"--{port}={free_port()}" for port in ports]
        with (self._folder / f"{name}.log").open("wb") as log:
            return subprocess.Popen(
                [
                    *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block"),
                    *(f"--num-cpus={cpus}", f"--node-name={name}", "--disable-usage-stats"),
                    *(*taken, *options),
                ],
                env={**os.environ, **self._env, **env},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def alive(self) -> set[str]:
        """Names of the nodes that are."""
        found = json.loads(self._get("/api/v0/nodes"))["data"]["result"]["result"]
        return {node["node_name"] for node in found if node["state"] == "ALIVE"}

    def await_nodes(self, number: int) -> None:
        """Until so many nodes are alive, neither more nor fewer."""
        self._await(lambda: len(self.alive()) == number)

    def _get(self, path: str) -> bytes:
        request = urllib.request.Request(f"{self.url}{path}", headers=self.headers)
        return urllib.request.urlopen(request, timeout=10).read()

    @staticmethod
    def _await(condition: Callable[[], object]) -> None:
        until = time.monotonic() + START_S
        while True:
            try:
                if condition():
                    return
            except OSError:  # it does not answer yet
                pass
            assert time.monotonic() < until, "the cluster does not come up"
            time.sleep(0.5)

    def close(self) -> None:
        for node in reversed(self.nodes):
            node.kill()
        shutil.rmtree(self._folder, ignore_errors=True)
