"""What serve_chaos.py does to an endpoint, part by part."""

from __future__ import annotations

import argparse
import os
import re
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import httpx
import psutil
import torch
from by_hand import Report
from client_load import ClientLoad
from ray import serve as ray_serve
from safetensors.torch import load_file, save_file
from steady_load import KINDS, SteadyLoad, by_kind, longest_stall, say, summary

from processes import free_port
from raptide.cluster import ray_session
from raptide.config import parse_settings
from raptide.errors import BundleError
from raptide.model.config import ModelSettings
from raptide.model.formats.detect import write_weights
from raptide.model.formats.weights import Weights
from raptide.model.transformer import Esm
from serve.app import compose
from serve.gateway.keys import make_key
from serve.replica.deployment import Replica
from serve.settings import ModelSettings as ServedModel
from serve.settings import ServeSettings

SLOW_LOAD_S = 20.0

BATCH_TOKENS, RESIDUES = 64, 50
"""A protein is a run: so requests of 64 runs end in seconds."""

SERVICER = "serve.rpc.raptide_pb2_grpc.add_RaptideServicer_to_server"

QUICK_PROXY = {
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "2",
}
"""For Serve's controller: how soon a dead proxy is noticed."""


class SlowReplica(Replica):
    """Takes as long to load as a large model."""

    def __init__(self, settings: ServedModel) -> None:
        time.sleep(SLOW_LOAD_S)
        super().__init__(settings)


def bundle(folder: Path, step: int) -> Path:
    """Weights of their own for each step, in the 8 M shape's width."""
    model = Esm(ModelSettings(layers=3, width=320, heads=20)).initialise(step)
    write_weights(folder, replace(Weights.of(model), lineage={"step": step}))
    return folder


class Endable(Replica):
    """Its batcher's thread can be ended, as an error in it would."""

    async def end_thread(self) -> int:
        """The process whose thread has ended."""
        self._batcher.close()
        return os.getpid()


@dataclass(frozen=True)
class Target:
    """Where the endpoint is, and the key that opens it: gRPC listens on every interface."""

    url: str
    grpc: str
    key: str

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    def load(self, clients: int = 8, body: dict | None = None) -> SteadyLoad:
        """Clients that send `body`, or all kinds of requests in turn, a run a protein."""
        if body is not None:
            return SteadyLoad(self.url, clients, body, **self.headers)
        return SteadyLoad(
            self.url,
            clients,
            kinds=KINDS,
            residues=RESIDUES,
            grpc=self.grpc,
            application="chaos",
            **self.headers,
        )


@contextmanager
def opened(folder: Path) -> Iterator[Target]:
    """A Ray and a Serve of its own."""
    with ray_session(num_cpus=6):
        port, grpc_port = free_port(), free_port()
        ray_serve.start(
            http_options={"host": "127.0.0.1", "port": port},
            grpc_options={"port": grpc_port, "grpc_servicer_functions": [SERVICER]},
        )
        key, line = make_key("chaos")
        (folder / "keys").write_text(line)
        yield Target(
            f"http://127.0.0.1:{port}",
            f"127.0.0.1:{grpc_port}",
            key,
        )
        ray_serve.shutdown()


def deploy(path: Path, replica: type = Replica) -> None:
    arguments = {
        "model": str(path),
        "replicas": 2,
        "max_queued_tokens": 1_000_000,
        "max_batch_tokens": BATCH_TOKENS,
        "keys_file": str(path.parent / "keys"),
    }
    settings = parse_settings(ServeSettings, arguments, source="chaos")
    ray_serve.run(compose(settings, replica), name="chaos")


def break_it(folder: Path, args: argparse.Namespace, report: Report) -> None:
    os.environ.update(QUICK_PROXY)
    with opened(folder) as target:
        deploy(bundle(folder / "1", 1), Endable)
        parts: dict[str, Callable[[], dict[str, Any]]] = {
            "baseline": partial(baseline, target, args.seconds),
            "kill": partial(kills, target, args.kills),
            "thread": partial(threads, target),
            "rollout": partial(rollouts, target, folder),
            "starvation": partial(starvation, target),
            "rest": partial(the_rest, target),
        }
        if args.skip_rest:
            del parts["rest"]
        for name, run in parts.items():
            with report.part(name):
                report[name] = run()
                report |= totals(report)


def totals(report: dict[str, Any]) -> dict[str, int]:
    """Of the parts that there are in which nothing may fail, clients' calls included."""
    parts = [report[name] for name in ("baseline", "kill", "thread", "rollout") if name in report]
    kinds = ("requests", "failed", "kills", "rollouts")
    clients = [part["clients"] for part in parts if "clients" in part]
    return {kind: sum(part.get(kind, 0) for part in parts) for kind in kinds} | {
        "calls": sum(each["calls"] for each in clients),
        "failed_calls": sum(each["failed"] + each["mixed"] for each in clients),
    }


def baseline(target: Target, seconds: float) -> dict[str, Any]:
    with target.load() as load:
        time.sleep(seconds)
    found = {**summary(load.answers), "kinds": by_kind(load.answers)}
    say(f"baseline: {found}")
    return found


def kills(target: Target, count: int) -> dict[str, Any]:
    """Kill a replica every few seconds, always one that has just answered."""
    handle = ray_serve.get_deployment_handle("replica-raptide", "chaos")
    with ClientLoad(target.url, target.key) as clients, target.load() as load:
        for number in range(count):
            pid = handle.process.remote().result()["pid"]
            os.kill(pid, signal.SIGKILL)
            say(f"killed replica {number + 1} of {count} (process {pid})")
            load.wait_for_more(48)
            time.sleep(8)
    found = {
        "kills": count,
        **summary(load.answers),
        "kinds": by_kind(load.answers),
        "clients": clients.summary,
    }
    say(f"kills: {found}")
    return found


def threads(target: Target) -> dict[str, Any]:
    """End the thread in which a replica computes: it is to be replaced, and nobody to notice."""
    handle = ray_serve.get_deployment_handle("replica-raptide", "chaos")
    with target.load() as load:
        load.wait_for_more(20)
        ended = handle.end_thread.remote().result()
        started = time.monotonic()
        while ended in (known := processes()) or len(known) < 2:
            assert time.monotonic() < started + 120, "it was not replaced"
            time.sleep(0.5)
        replaced_s = round(time.monotonic() - started, 1)
        load.wait_for_more(20)
    found = {
        "replaced_after_s": replaced_s,
        **summary(load.answers),
        "kinds": by_kind(load.answers),
    }
    say(f"a batcher's thread ended: {found}")
    return found


def processes() -> set[int]:
    """Of the replicas that run."""
    handle = ray_serve.get_deployment_handle("replica-raptide", "chaos")
    told = handle.broadcast("process").results(return_exceptions=True)
    return {each["pid"] for each in told if isinstance(each, dict)}


def rollouts(target: Target, folder: Path) -> dict[str, Any]:
    """Checkpoints 2 and 3 (slow to load), then two bad ones."""
    stalls = {}
    refused = []
    with ClientLoad(target.url, target.key) as clients, target.load() as load:
        load.wait_for_more(50)
        for step, replica in ((2, Replica), (3, SlowReplica)):
            seen = len(load.answers)
            started = time.monotonic()
            deploy(bundle(folder / str(step), step), replica)
            load.wait_for(lambda a, step=step: {told.step for told in a[-16:]} == {str(step)})
            stalls[step] = round(longest_stall(load.answers[seen:]), 3)
            say(f"step {step} took over {time.monotonic() - started:.1f} s after it was asked for")
        for name, damage in (("rolled", lambda t: torch.roll(t, 1, 0)), ("nan", torch.nan_to_num)):
            bad = bundle(folder / name, 4)
            tensors = load_file(bad / "model.safetensors")
            spoilt = {key: damage(tensor) for key, tensor in tensors.items()}
            if name == "nan":
                spoilt = {key: torch.full_like(tensor, torch.nan) for key, tensor in spoilt.items()}
            save_file(spoilt, bad / "model.safetensors", metadata={"format": "pt"})
            try:
                deploy(bad)
            except BundleError as error:  # before a replica sees it
                refused.append(name)
                say(f"refused ({name}): {error}")
            except RuntimeError:
                refused.append(name)
                say(f"refused ({name}): {_reason()}")
            load.wait_for_more(48)
    after = {told.step for told in load.answers[-48:]}
    found = {
        "rollouts": 2,
        "refused": refused,
        "still_served": sorted(map(str, after)),
        "stall_s": stalls,
        **summary(load.answers),
        "clients": clients.summary,
        "kinds": by_kind(load.answers),
    }
    say(f"rollouts: {found}")
    return found


def _reason() -> str:
    """Why Serve gave an update up, in the replica's own words."""
    deployments = ray_serve.status().applications["chaos"].deployments
    message = deployments["replica-raptide"].message
    found = re.findall(r"BundleError: (.*)", message)
    return found[-1] if found else message


def starvation(target: Target) -> dict[str, Any]:
    """Seconds of a long protein in a flood, against those of the short ones that came with it.

    The fair share: what was queued before it, at the speed at which tokens are computed. A short
    one that comes at the same moment waits for the same, so its time is the measure.
    """
    long_body = {"input": "MKTAYIAKQR" * 102 + "MK", "encoding_format": "base64"}
    short_body = {"input": "MKTAYIAKQR" * 6, "encoding_format": "base64"}
    with target.load(32, short_body) as load:
        load.wait_for_more(48)
        alone = []
        with httpx.Client(base_url=target.url, timeout=120.0, headers=target.headers) as client:
            for _ in range(10):
                started = time.monotonic()
                client.post("/v1/embeddings", json=long_body).raise_for_status()
                alone.append(time.monotonic() - started)
    short = [told.seconds for told in load.answers]
    with httpx.Client(base_url=target.url, timeout=120.0, headers=target.headers) as client:
        idle = []
        for _ in range(5):
            started = time.monotonic()
            client.post("/v1/embeddings", json=long_body).raise_for_status()
            idle.append(time.monotonic() - started)
    found = {
        "long_in_flood_s": round(statistics.median(alone), 3),
        "long_in_flood_worst_s": round(max(alone), 3),
        "long_idle_s": round(statistics.median(idle), 3),
        "short_in_flood_s": round(statistics.median(short), 3),
        "short_requests": len(short),
    }
    say(f"starvation: {found}")
    return found


def the_rest(target: Target) -> dict[str, Any]:
    """Kill gateway, proxy and controller, and see how long clients get no answer."""
    found = {}
    patterns = {"gateway": "Gateway", "proxy": "ProxyActor", "controller": "ServeController"}
    for name, title in patterns.items():
        with ClientLoad(target.url, target.key) as clients, target.load() as load:
            load.wait_for_more(50)
            victim = child_process(title)
            os.kill(victim, signal.SIGKILL)
            killed = time.monotonic()
            time.sleep(2)
            load.wait_for(lambda a: all(told.status == 200 for told in a[-40:]), 120)
        errors: dict[str, int] = {}
        for told in load.failed:
            errors[str(told.status)] = errors.get(str(told.status), 0) + 1
        last = max((told.done for told in load.failed), default=killed)
        found[name] = {
            **summary(load.answers),
            "errors": errors,
            "until_s": round(last - killed, 2),
            "clients": clients.summary,
        }
        say(f"{name} killed: {found[name]}")
    return found


def child_process(title: str) -> int:
    """The process of an actor of this Ray, by its title."""
    for process in psutil.Process().children(recursive=True):
        try:
            if title in " ".join(process.cmdline()) and "ray::" in process.cmdline()[0]:
                return process.pid
        except (psutil.Error, IndexError):
            continue
    raise RuntimeError(f"There is no process of {title}.")
