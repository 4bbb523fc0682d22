"""One Serve for all modules: an endpoint, and one with several keys and two models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import pytest
import torch
from ray import serve as ray_serve

from processes import free_port
from raptide.inference.engine import Engine
from raptide.model.config import ModelSettings
from raptide.model.contacts import ContactHead
from raptide.model.formats.detect import write_weights
from raptide.model.formats.weights import Weights
from raptide.model.transformer import Esm
from serve.app import build
from serve.gateway.keys import make_key

LINEAGE = {"step": 5, "corpus_digest": "abc"}


def make_bundle(folder: Path, seed: int, step: int = 5, *, with_head: bool = True) -> Path:
    shape = ModelSettings(layers=2, width=32, heads=4)
    model = Esm(shape, with_head=with_head).initialise(seed)
    generator = torch.Generator().manual_seed(seed)
    head = ContactHead(torch.randn(1, 8, generator=generator), torch.zeros(1))
    weights = replace(Weights.of(model), contact_head=head, lineage={**LINEAGE, "step": step})
    write_weights(folder, weights)
    return folder


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle"), seed=1)


@pytest.fixture(scope="session")
def engine(bundle: Path) -> Engine:
    return Engine.load(bundle)


SERVICERS = [
    "serve.rpc.service.add_service",
    "serve.rpc.health.add_HealthServicer_to_server",
]
TRACED = {"enabled": True, "sampling_ratio": 0.0}
"""To files of Serve's log, what clients ask to be traced."""


@dataclass
class Proxy:
    """Where Serve listens. As gRPC is among it, every endpoint needs keys; this one opens all."""

    url: str
    grpc: str
    key: str
    keys_file: Path

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}


@pytest.fixture(scope="session")
def proxy(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    port, grpc_port = free_port(), free_port()
    ray_serve.start(
        http_options={"host": "127.0.0.1", "port": port},
        grpc_options={"port": grpc_port, "grpc_servicer_functions": SERVICERS},
        tracing_config=TRACED,
    )
    key, line = make_key("tests")
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(line)
    yield Proxy(f"http://127.0.0.1:{port}", f"127.0.0.1:{grpc_port}", key, file)
    ray_serve.shutdown()


@pytest.fixture(scope="session")
def client(proxy: Proxy, bundle: Path) -> Iterator[httpx.Client]:
    arguments = {
        "model": str(bundle),
        "keys_file": str(proxy.keys_file),
        "max_sequences": 64,
        "max_residues": 500,
        "max_queued_tokens": 100_000,
        "max_batch_tokens": 2048,
        "max_body_bytes": 100_000,
    }
    ray_serve.run(build(arguments), name="raptide")
    with httpx.Client(base_url=proxy.url, timeout=60.0, headers=proxy.headers) as client:
        yield client


@dataclass
class Keyed:
    """An endpoint with keys; its model `tuned` has no language-model head."""

    url: str
    file: Path
    keys: dict[str, str]
    lines: dict[str, str]

    def client(self, name: str | None = None, **headers: str) -> httpx.Client:
        if name is not None:
            headers["Authorization"] = f"Bearer {self.keys.get(name, name)}"
        return httpx.Client(base_url=self.url, timeout=60.0, headers=headers)

    def write(self, *names: str) -> None:
        self.file.write_text("".join(f"{self.lines[name]}\n" for name in names))


@pytest.fixture(scope="session")
def keyed(proxy: Proxy, bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Keyed:
    folder = tmp_path_factory.mktemp("keyed")
    made = {name: make_key(name) for name in ("lab", "guest", "slow")}
    endpoint = Keyed(
        f"{proxy.url}/keyed",
        folder / "keys",
        {name: key for name, (key, _) in made.items()},
        {name: line for name, (_, line) in made.items()},
    )
    endpoint.lines["slow"] += " 600"
    endpoint.write("lab", "guest", "slow")
    models = [
        {"name": "base", "path": str(bundle), "cpus_per_replica": 0.5},
        {
            "name": "tuned",
            "path": str(make_bundle(folder / "tuned", seed=2, step=9, with_head=False)),
            "cpus_per_replica": 0.5,
            "max_batch_tokens": 1024,
            "min_replicas": 0,
            "max_replicas": 1,
        },
    ]
    arguments = {
        "models": models,
        "keys_file": str(endpoint.file),
        "cors_origins": ["https://lab.example"],
    }
    ray_serve.run(build(arguments), name="keyed", route_prefix="/keyed")
    return endpoint
