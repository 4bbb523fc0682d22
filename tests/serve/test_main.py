"""`python -m serve`: stays until SIGTERM, and finishes what it has begun."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import grpc
import httpx
import psutil
import pytest
import yaml
from conftest import ROOT
from ray.serve.schema import ServeDeploySchema

from processes import free_port
from serve.environment import proxies
from serve.gateway.keys import make_key
from serve.rpc import raptide_pb2 as pb
from serve.rpc.raptide_pb2_grpc import RaptideStub

SLOW = {"sequences": "MKTAYIAKQR" * 40}
"""400 masked passes: seconds, also for a small model."""

LARGE = {"input": ["MKTAYIAKQR" * 100] * 16, "pooling": "residue"}
"""Its answer is larger than gRPC takes by default, 4 MB."""


def start(config, folder):
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    return subprocess.Popen(
        [sys.executable, "-m", "serve", file],
        cwd=ROOT,
        env=os.environ | {"RAY_ADDRESS": "local"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def configuration(port, grpc_port=None, **arguments):
    by_grpc = {"port": grpc_port, "grpc_servicer_functions": ["serve.rpc.service.add_service"]}
    return {
        "http_options": {"host": "127.0.0.1", "port": port},
        "grpc_options": by_grpc if grpc_port else {},
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
    """How much memory the proxy and the gateway take at most, above what they took before."""

    def __init__(self, process):
        names = ("ray::ProxyActor", "ServeReplica:raptide:Gateway")
        of_ray = psutil.Process(process.pid).children(recursive=True)
        found = [each for each in of_ray if any(name in " ".join(each.cmdline()) for name in names)]
        assert len(found) == 2
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
    """And large gRPC messages do not, with a wrong key they are not even read."""
    port, grpc_port = free_port(), free_port()
    key, line = make_key("tests")
    (tmp_path / "keys").write_text(line)
    keyed = {"Authorization": f"Bearer {key}"}
    arguments = {"model": str(bundle), "keys_file": str(tmp_path / "keys")}
    with start(configuration(port, grpc_port, **arguments), tmp_path) as process:
        url = f"http://127.0.0.1:{port}"
        assert any(line.strip().endswith(url) for line in process.stdout)
        assert len(embed_by_grpc(grpc_port, 10_000, key)) >= 1
        peak = Peak(process)
        assert embed_by_grpc(grpc_port, 120_000_000, "wrong") == "RESOURCE_EXHAUSTED"
        assert peak.grown_bytes < 4e7
        assert embed_by_grpc(grpc_port, 8_000_000, "wrong") == "UNAUTHENTICATED"
        large = httpx.post(f"{url}/v1/embeddings", json=LARGE, timeout=120, headers=keyed)
        assert large.status_code == 200
        assert len(large.content) > 2**22
        answers = []
        post = threading.Thread(
            target=lambda: answers.append(
                httpx.post(f"{url}/v1/scores", json=SLOW, timeout=120, headers=keyed)
            )
        )
        post.start()
        post.join(0.7)
        assert not answers, "the request was to take longer"
        process.send_signal(signal.SIGTERM)
        post.join()
        assert answers[0].status_code == 200
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


def test_a_file_that_is_no_configuration_is_refused(tmp_path):
    with start({"applications": [{"route": "/"}]}, tmp_path) as process:
        told = process.stdout.read()
        assert process.wait() == 2
    assert told.startswith("error: ")
    assert "import_path" in told
