"""What serve_day.py does with an endpoint from morning to evening."""

from __future__ import annotations

import argparse
import os
import re
import signal
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import httpx
import ray
from breakages import bundle, child_process
from by_hand import Report
from client_load import ClientLoad
from ray import serve as ray_serve
from steady_load import SteadyLoad, say, summary

from processes import free_port
from raptide.cluster import ray_session
from serve.app import build
from serve.gateway.keys import make_key


class Day:
    """An endpoint, its keys, and what was seen of it."""

    def __init__(self, folder: Path, url: str, report: Report) -> None:
        self.folder = folder
        self.url = url
        self.made = {name: make_key(name) for name in ("lab", "guest")}
        self.keys = folder / "keys"
        self.report = report
        report |= {"as_it_should_be": [], "wrong": []}

    def deploy(self, step: int) -> None:
        started = time.monotonic()
        arguments = {
            "model": str(bundle(self.folder / str(step), step)),
            "keys_file": str(self.keys),
            "max_replicas": 2,
            "target_tokens_per_replica": 600,
            "upscale_delay_s": 1,
            "downscale_delay_s": 10,
        }
        ray_serve.run(build(arguments), name="day")
        say(f"deployed step {step} in {time.monotonic() - started:.1f} s")

    def allow(self, *names: str) -> None:
        self.keys.write_text("".join(f"{self.made[name][1]}\n" for name in names))

    def headers(self, name: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.made[name][0]}"}

    def ask(self, name: str) -> httpx.Response:
        body = {"input": "MKTAYIAKQR"}
        return httpx.post(
            f"{self.url}/v1/embeddings", json=body, headers=self.headers(name), timeout=60
        )

    def expect(self, holds: bool, what: str) -> None:
        say(f"{'as it should be' if holds else 'WRONG'}: {what}")
        self.report["as_it_should_be" if holds else "wrong"].append(what)

    def wait_for(self, holds: Any, seconds: float) -> float | None:
        """Seconds until it held; None if it did not."""
        started = time.monotonic()
        while time.monotonic() - started < seconds:
            if holds():
                return time.monotonic() - started
            time.sleep(0.2)
        return None


def replicas() -> int:
    deployments = ray_serve.status().applications["day"].deployments
    states = deployments["replica-raptide"].replica_states
    return {str(key): value for key, value in states.items()}.get("RUNNING", 0)


def metrics() -> dict[str, float]:
    """Totals of what Prometheus would read."""
    port = ray.nodes()[0]["MetricsExportPort"]
    text = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=30).text
    totals: dict[str, float] = {}
    for name, value in re.findall(r"^ray_(raptide_\w+?)\{[^}]*\} (\S+)$", text, re.MULTILINE):
        totals[name] = totals.get(name, 0.0) + float(value)
    return totals


def live(folder: Path, args: argparse.Namespace, report: Report) -> None:
    with ray_session(num_cpus=6):
        port = free_port()
        ray_serve.start(http_options={"host": "127.0.0.1", "port": port})
        day = Day(folder, f"http://127.0.0.1:{port}", report)
        with report.part("morning"):
            open_up(day)
            answered = rush_hour(day, args.answers)
        with report.part("noon"):
            restart(day)
        with report.part("evening"):
            revoke_a_key(day)
            calm_down(day, answered)
        with report.part("closing time"):
            close_down(day)
        ray_serve.shutdown()


def open_up(day: Day) -> None:
    day.allow("lab", "guest")
    day.deploy(1)
    ready = httpx.get(f"{day.url}/readyz", timeout=60)
    day.expect(ready.status_code == 200, f"ready: {ready.text}")
    (model,) = httpx.get(f"{day.url}/v1/models", headers=day.headers("lab")).json()["data"]
    day.expect(model["verified"], f"serves step {model['lineage']['step']}, {model['weights']}")


def rush_hour(day: Day, answers: int) -> int:
    """A second replica and a new checkpoint come under load; how much was answered."""
    say("the morning's load comes: 16 clients")
    with (
        ClientLoad(day.url, day.made["lab"][0]) as clients,
        SteadyLoad(day.url, clients=16, **day.headers("lab")) as load,
    ):
        grown_s = day.wait_for(lambda: replicas() == 2, 120)
        day.expect(grown_s is not None, f"a second replica runs after {grown_s or 120:.0f} s")
        load.wait_for_more(answers)
        say("a new checkpoint is rolled out under load")
        day.deploy(2)
        load.wait_for(lambda answers: {told.step for told in answers[-32:]} == {"2"})
    told = summary(load.answers)
    day.expect(told["failed"] == 0, f"nothing failed: {told}")
    expect_whole_calls(day, clients, "the scale-up and the update")
    return len(load.answers)


def restart(day: Day) -> None:
    """Gateway and proxy die, and the application goes and comes: calls of clients outlast it."""
    say("gateway and proxy are killed, then the endpoint is stopped and started again")
    with ClientLoad(day.url, day.made["lab"][0]) as clients:
        for title in ("Gateway", "ProxyActor"):
            before = len(clients.calls)
            os.kill(child_process(title), signal.SIGKILL)
            day.wait_for(lambda before=before: len(clients.calls) >= before + 8, 120)
        ray_serve.delete("day")
        day.deploy(3)
        before = len(clients.calls)
        day.wait_for(lambda: len(clients.calls) >= before + 8, 120)
    expect_whole_calls(day, clients, "kills and a restart")


def expect_whole_calls(day: Day, clients: ClientLoad, meanwhile: str) -> None:
    told = clients.summary
    day.report.setdefault("clients", {})[meanwhile] = told
    whole = told["calls"] > 0 and told["failed"] == told["mixed"] == 0
    day.expect(whole, f"both clients' calls went through {meanwhile}, none mixed: {told}")


def revoke_a_key(day: Day) -> None:
    say("the guest's key is revoked")
    before = day.ask("guest").status_code
    day.allow("lab")
    revoked_s = day.wait_for(lambda: day.ask("guest").status_code == 401, 10)
    day.expect(
        before == 200 and revoked_s is not None,
        f"refused {revoked_s or 10:.1f} s after its line went",
    )
    day.expect(day.ask("lab").status_code == 200, "the lab's key is good as before")


def calm_down(day: Day, answered: int) -> None:
    say("the evening is quiet")
    shrunk_s = day.wait_for(lambda: replicas() == 1, 120)
    day.expect(shrunk_s is not None, f"one replica is left after {shrunk_s or 120:.0f} s")

    day.wait_for(lambda: metrics().get("raptide_requests_total", 0) >= answered, 30)
    read = metrics()
    names = ("requests_total", "residues_total", "computed_tokens_total", "errors_total")
    shown = {name: round(read.get(f"raptide_{name}", 0)) for name in names}
    day.expect(shown["requests_total"] >= answered, f"the day's metrics: {shown}")


def close_down(day: Day) -> None:
    say("closing time: the endpoint is deleted while a long request is on its way")
    late: list[httpx.Response] = []
    body = {"sequences": "MKTAYIAKQR" * 15}
    post = partial(httpx.post, json=body, headers=day.headers("lab"), timeout=120)
    asking = threading.Thread(target=lambda: late.append(post(f"{day.url}/v1/scores")))
    asking.start()
    time.sleep(1.0)
    ray_serve.delete("day", _blocking=False)
    asking.join()
    day.expect(
        late[0].status_code == 200 and late[0].elapsed.total_seconds() > 1.0,
        f"it is answered: {late[0].status_code} after {late[0].elapsed.total_seconds():.1f} s",
    )
