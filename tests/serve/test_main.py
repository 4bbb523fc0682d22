"""`python -m serve`: stays until SIGTERM, and finishes what it has begun."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import httpx
import psutil
import pytest
import yaml
from conftest import ROOT
from endpoints import SERVICERS
from ray.serve.schema import (
    ApplicationStatusOverview,
    DeploymentStatusOverview,
    ServeDeploySchema,
)
from steady_load import KINDS, REFUSED, SteadyLoad, by_kind

from processes import free_port
from serve.__main__ import missing
from serve.environment import proxies
from serve.gateway.keys import make_key
from serve.rpc import raptide_pb2 as pb
from serve.rpc.raptide_pb2_grpc import RaptideStub

SLOW = {"sequences": "MKTAYIAKQR" * 40}
"""400 masked passes: seconds, also for a small model."""

MANY = {"sequences": ["MKTAYIAKQR" * 10] * 24}
"""24 runs, of which eight are on their way at a time."""

LARGE = {"input": ["MKTAYIAKQR" * 100] * 16, "pooling": "residue"}
"""Its answer is larger than gRPC takes by default, 4 MB."""


@contextmanager
def started(config, folder):
    """`python -m serve` of a configuration, its output as lines; it is gone when the block ends."""
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    with subprocess.Popen(
        [sys.executable, "-m", "serve", file],
        cwd=ROOT,
        env=os.environ | {"RAY_ADDRESS": "local"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()  # what it started goes with it


def wait_for_line(process, end, *, within_s):
    """Read until a line of a process's output ends so."""
    limit = threading.Timer(within_s, process.kill)
    limit.start()
    told = []
    try:
        for line in process.stdout:
            told.append(line)
            if line.rstrip().endswith(end):
                return
    finally:
        limit.cancel()
    raise AssertionError(f"no line ends in {end}:\n{''.join(told)}")


def configuration(port, grpc_port=None, **arguments):
    by_grpc = {"port": grpc_port, "grpc_servicer_functions": SERVICERS} if grpc_port else {}
    return {
        "http_options": {"host": "127.0.0.1", "port": port},
        "grpc_options": by_grpc,
        "applications": [
            {
                "name": "raptide",
                "route_prefix": "/",
                "import_path": "serve.app:build",
                "args": arguments,
            }
        ],
    }


class Peak:
    """How much memory the proxy and a gateway take at most, above what they took before."""

    def __init__(self, process):
        names = ("ray::ProxyActor", "ServeReplica:raptide:Gateway")
        of_ray = psutil.Process(process.pid).children(recursive=True)
        found = [each for each in of_ray if any(name in " ".join(each.cmdline()) for name in names)]
        assert len(found) == 3, "a proxy and two gateways"
        self._folders = [Path(f"/proc/{each.pid}") for each in found]
        for folder in self._folders:
            (folder / "clear_refs").write_text("5")
        self._before = self._read("VmRSS")

    def _read(self, name):
        texts = [(folder / "status").read_text() for folder in self._folders]
        return [1024 * int(text.split(f"{name}:")[1].split()[0]) for text in texts]

    @property
    def grown_bytes(self):
        pairs = zip(self._read("VmHWM"), self._before, strict=True)
        return max(peak - before for peak, before in pairs)


def embed_by_grpc(port, size, key):
    """The status of a request of so many letters."""
    options = [("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(f"127.0.0.1:{port}", options) as channel:
        request = pb.EmbedRequest(sequences=["A" * 1000] * (size // 1000))
        metadata = [("application", "raptide"), ("authorization", f"Bearer {key}")]
        try:
            return list(RaptideStub(channel).Embed(request, metadata=metadata, timeout=120))
        except grpc.RpcError as error:
            return error.code().name


def test_large_answers_pass_and_what_is_being_answered_at_sigterm_is_finished(bundle, tmp_path):
    """Of requests of 1, 3, 8 and 64 runs by all ways, and of some that take seconds.

    Large gRPC messages do not pass; with a wrong key they are not even read.
    """
    port, grpc_port = free_port(), free_port()
    key, line = make_key("tests")
    (tmp_path / "keys").write_text(line)
    headers = {"Authorization": f"Bearer {key}"}
    config = configuration(
        port,
        grpc_port,
        model=str(bundle),
        keys_file=str(tmp_path / "keys"),
        gateways=2,
        max_batch_tokens=64,
        max_queued_tokens=10**7,
    )
    with started(config, tmp_path) as process:
        url = f"http://127.0.0.1:{port}"
        starting = first_word(f"{url}/healthz")
        assert (starting.status_code, starting.headers["Retry-After"]) == (503, "1"), starting.text
        assert starting.json()["error"]["type"] == "unavailable"
        wait_for_line(process, url, within_s=300)
        assert len(embed_by_grpc(grpc_port, 10_000, key)) >= 1
        peak = Peak(process)
        assert embed_by_grpc(grpc_port, 120_000_000, "wrong") == "RESOURCE_EXHAUSTED"
        assert peak.grown_bytes < 4e7
        assert embed_by_grpc(grpc_port, 8_000_000, "wrong") == "UNAUTHENTICATED"
        large = httpx.post(f"{url}/v1/embeddings", json=LARGE, headers=headers, timeout=120)
        assert large.status_code == 200
        assert len(large.content) > 2**22
        named = httpx.get(f"{url}/healthz", headers={"X-Request-Id": "9" * 5000})
        assert set(named.headers.get_list("X-Request-Id")) == {"9" * 128}
        answers = []

        def ask(body):
            answers.append(httpx.post(f"{url}/v1/scores", json=body, headers=headers, timeout=120))

        asking = [threading.Thread(target=ask, args=[body]) for body in (SLOW, MANY)]
        load = SteadyLoad(
            url,
            clients=6,
            kinds=KINDS,
            grpc=f"127.0.0.1:{grpc_port}",
            application="raptide",
            until_refused=True,
            **headers,
        )
        with load:
            load.wait_for_more(12)
            for each in asking:
                each.start()
            asking[0].join(0.7)
            assert not answers, "the requests were to take longer"
            process.send_signal(signal.SIGTERM)
            refused = refusal(url)
            load.join()
        for each in asking:
            each.join()
        assert [answer.status_code for answer in answers] == [200, 200]
        assert refused.status_code == 503
        assert int(refused.headers["Retry-After"]) >= 1
        assert {told.status for told in load.answers} <= {200, *REFUSED}, by_kind(load.answers)
        assert process.wait(60) == 0


@pytest.mark.parametrize(
    ("bodies", "most"),
    [([None], 2**23), ([2**20], 2**22), ([2**24], 2**24), ([2**24, None, 2**25], 2**25)],
)
def test_a_proxy_takes_no_larger_message_than_an_application_may_be_sent(bodies, most):
    applications = [
        {"name": str(index), "route_prefix": f"/{index}", "import_path": "serve.app:build"}
        | ({"args": {"max_body_bytes": body}} if body else {})
        for index, body in enumerate(bodies)
    ]
    config = ServeDeploySchema.model_validate({"applications": applications})
    assert proxies(config)["RAY_SERVE_GRPC_MAX_MESSAGE_SIZE"] == str(most)


def test_a_start_says_what_it_waits_for():
    assert missing("a", None) == "a: being built"
    gateway = DeploymentStatusOverview("HEALTHY", "UNSPECIFIED", {"RUNNING": 2}, "")
    states = {"STARTING": 1, "RUNNING": 1}
    replicas = DeploymentStatusOverview("UPDATING", "UNSPECIFIED", states, "No CPU is free.")
    deployments = {"Gateway": gateway, "replica-a": replicas}
    status = ApplicationStatusOverview("DEPLOYING", "", 0.0, deployments)
    assert missing("a", status) == (
        "a: waiting; Gateway has 2 running; replica-a has 1 starting, 1 running (No CPU is free.)"
    )
    assert missing("a", replace(status, status="RUNNING")) == ""


def first_word(url):
    """Of Serve's proxy, before there is anything behind it."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        try:
            return httpx.get(url, timeout=30)
        except httpx.TransportError:
            time.sleep(0.05)
    raise AssertionError("nothing listens")


def refusal(url):
    """Of a probe, once the gateways take nothing new."""
    for _ in range(100):
        answer = httpx.get(f"{url}/healthz", timeout=120)
        if answer.status_code != 200:
            return answer
        time.sleep(0.05)
    raise AssertionError("gateways go on taking requests")


def test_a_file_that_is_no_configuration_is_refused(tmp_path):
    with started({"applications": [{"route": "/"}]}, tmp_path) as process:
        told = process.stdout.read()
        assert process.wait() == 2
    assert told.startswith("error: ")
    assert "import_path" in told
