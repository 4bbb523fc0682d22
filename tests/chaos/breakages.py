"""What serve_chaos.py does to an endpoint, part by part."""

from __future__ import annotations

import argparse
import os
import re
import signal
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
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
from steady_load import SteadyLoad, longest_stall, say, summary

from processes import free_port
from raptide.cluster import ray_session
from raptide.config import parse_settings
from raptide.model.config import ModelSettings
from raptide.model.formats.detect import write_weights
from raptide.model.formats.weights import Weights
from raptide.model.transformer import Esm
from serve.app import compose
from serve.replica.deployment import Replica
from serve.settings import ModelSettings as ServedModel
from serve.settings import ServeSettings

SLOW_LOAD_S = 20.0

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


def deploy(path: Path, replica: type = Replica) -> None:
    arguments = {"model": str(path), "replicas": 2, "max_queued_tokens": 1_000_000}
    settings = parse_settings(ServeSettings, arguments, source="chaos")
    ray_serve.run(compose(settings, replica), name="chaos")


def break_it(folder: Path, args: argparse.Namespace, report: Report) -> None:
    os.environ.update(QUICK_PROXY)
    with ray_session(num_cpus=6):
        port = free_port()
        ray_serve.start(http_options={"host": "127.0.0.1", "port": port})
        url = f"http://127.0.0.1:{port}"
        deploy(bundle(folder / "1", 1))
        parts: dict[str, Callable[[], dict[str, Any]]] = {
            "baseline": partial(baseline, url, args.seconds),
            "kill": partial(kills, url, args.kills),
            "rollout": partial(rollouts, url, folder),
            "starvation": partial(starvation, url),
            "rest": partial(the_rest, url),
        }
        if args.skip_rest:
            del parts["rest"]
        for name, run in parts.items():
            with report.part(name):
                report[name] = run()
                report |= totals(report)
        ray_serve.shutdown()


def totals(report: dict[str, Any]) -> dict[str, int]:
    """Of the parts that there are in which nothing may fail."""
    parts = [report[name] for name in ("baseline", "kill", "rollout") if name in report]
    kinds = ("requests", "failed", "kills", "rollouts")
    return {kind: sum(part.get(kind, 0) for part in parts) for kind in kinds}


def baseline(url: str, seconds: float) -> dict[str, Any]:
    with SteadyLoad(url, clients=8) as load:
        time.sleep(seconds)
    found = summary(load.answers)
    say(f"baseline: {found}")
    return found


def kills(url: str, count: int) -> dict[str, Any]:
    """Kill a replica every few seconds, always one that has just answered."""
    handle = ray_serve.get_deployment_handle("replica-raptide", "chaos")
    with ClientLoad(url) as clients, SteadyLoad(url, clients=8) as load:
        for number in range(count):
            pid = handle.process.remote().result()["pid"]
            os.kill(pid, signal.SIGKILL)
            say(f"killed replica {number + 1} of {count} (process {pid})")
            load.wait_for_more(100)
            time.sleep(8)
    found = {"kills": count, **summary(load.answers), "clients": clients.summary}
    say(f"kills: {found}")
    return found


def rollouts(url: str, folder: Path) -> dict[str, Any]:
    """Checkpoints 2 and 3 (slow to load), then two bad ones."""
    stalls = {}
    refused = []
    with ClientLoad(url) as clients, SteadyLoad(url, clients=8) as load:
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
            except RuntimeError:
                refused.append(name)
                say(f"refused ({name}): {_reason()}")
            load.wait_for_more(100)
    after = {told.step for told in load.answers[-100:]}
    found = {
        "rollouts": 2,
        "refused": refused,
        "still_served": sorted(map(str, after)),
        "stall_s": stalls,
        **summary(load.answers),
        "clients": clients.summary,
    }
    say(f"rollouts: {found}")
    return found


def _reason() -> str:
    """Why Serve gave an update up, in the replica's own words."""
    deployments = ray_serve.status().applications["chaos"].deployments
    message = deployments["replica-raptide"].message
    found = re.findall(r"BundleError: (.*)", message)
    return found[-1] if found else message


def starvation(url: str) -> dict[str, Any]:
    """Seconds of a long protein in a flood, against those of the short ones that came with it.

    The fair share: what was queued before it, at the speed at which tokens are computed. A short
    one that comes at the same moment waits for the same, so its time is the measure.
    """
    long_body = {"input": "MKTAYIAKQR" * 102 + "MK", "encoding_format": "base64"}
    short_body = {"input": "MKTAYIAKQR" * 6, "encoding_format": "base64"}
    with SteadyLoad(url, clients=32, body=short_body) as load:
        load.wait_for_more(100)
        alone = []
        with httpx.Client(base_url=url, timeout=120.0) as client:
            for _ in range(10):
                started = time.monotonic()
                client.post("/v1/embeddings", json=long_body).raise_for_status()
                alone.append(time.monotonic() - started)
    short = [told.seconds for told in load.answers]
    with httpx.Client(base_url=url, timeout=120.0) as client:
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


def the_rest(url: str) -> dict[str, Any]:
    """Kill gateway, proxy and controller, and see how long clients get no answer."""
    found = {}
    patterns = {"gateway": "Gateway", "proxy": "ProxyActor", "controller": "ServeController"}
    for name, title in patterns.items():
        with ClientLoad(url) as clients, SteadyLoad(url, clients=8) as load:
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
