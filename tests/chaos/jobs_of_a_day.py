"""What cluster_day.py does to a cluster, part by part."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml
from by_hand import Report
from checkout import ROOT
from raylets import Raylets

from processes import free_port
from raptide.training.watching.audit import audited_steps

PATIENCE_S = 400.0
TRAINER = "trainer"

OTHER_RAY = "2.59.0"

PROTEINS = 40
"""That the bulk job embeds."""


class Day:
    """A cluster, a folder that all its nodes see, and commands to it."""

    def __init__(self, cluster: Raylets, folder: Path, steps: int) -> None:
        self.cluster, self.folder, self.steps = cluster, folder, steps
        for _ in range(2):
            self.add_trainer()
        self.env = {**os.environ, **self.cluster.environment}
        self.env["RAY_API_SERVER_ADDRESS"] = self.cluster.url
        self.env.pop("RAY_ADDRESS", None)
        fasta = Path(str(files("pyhmmer") / "tests/data/seqs/938293.PRJEB85.HG003687.faa"))
        self.fasta = folder / "proteins.fasta"
        shutil.copy(fasta, self.fasta)
        self.corpus, self.recipe = folder / "corpus", folder / "recipe.yaml"
        self.recipe.write_text(yaml.safe_dump(self._recipe()))

    def add_trainer(self) -> None:
        self.cluster.add(1, resources=json.dumps({TRAINER: 1}))

    def command(self, *arguments: str | Path, script: str = "submit_job") -> list[str]:
        return [sys.executable, str(ROOT / f"jobs/{script}.py"), *map(str, arguments)]

    def run(self, *arguments: str | Path, script: str = "submit_job") -> Any:
        done = subprocess.run(
            self.command(*arguments, script=script),
            env=self.env,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=2 * PATIENCE_S,
        )
        say(f"{' '.join(map(str, arguments))[:100]}: {done.returncode}\n{done.stderr[-1500:]}")
        return done

    def start(self, log: str, *arguments: str | Path) -> subprocess.Popen[bytes]:
        """A command that goes on beside us; its output is in `log` of the folder."""
        with (self.folder / log).open("wb") as file:
            return subprocess.Popen(
                self.command(*arguments),
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def pretraining(self, name: str, **overrides: Any) -> list[str | Path]:
        settings = [f"{key.replace('__', '.')}={value}" for key, value in overrides.items()]
        run = self.folder / name
        start = ["pretrain_model", "--config", self.recipe, "--output", run, "--start-or-resume"]
        return ["--name", name, "--retries", "3", *start, *settings]

    def plain(self) -> list[str | Path]:
        """The run that nothing happens to, on the head alone, beside the others."""
        alone = {"cluster__workers": 1, "cluster__worker_resources": "{}"}
        return self.pretraining("plain", **alone)

    def await_plain(self) -> None:
        """A second submit follows it, or finds it finished."""
        assert self.run(*self.plain()).returncode == 0

    def await_step(self, name: str, step: int) -> int:
        """Wait until a run has logged a step; returns its last."""
        file = self.folder / name / "metrics.jsonl"

        def last() -> int:
            lines = file.read_text().splitlines() if file.exists() else []
            return json.loads(lines[-1])["trainer/global_step"] if lines else 0

        wait_until(lambda: last() >= step, f"step {step} of {name}")
        return last()

    def rows(self, name: str) -> dict[int, Any]:
        return dict(audited_steps(self.folder / name))

    def kill_driver(self, name: str) -> bool:
        """SIGKILL the job's own process; whether there was one."""
        for process in self.cluster.nodes[0].processes():
            try:
                command = process.cmdline()
            except psutil.Error:
                continue
            if str(self.folder / name) in command and "jobs/pretrain_model.py" in command:
                process.send_signal(signal.SIGKILL)
                return True
        return False

    def _recipe(self) -> dict[str, Any]:
        return {
            "name": "day",
            "corpus": str(self.corpus),
            "stream": {"row_tokens": 512, "crop_tokens": 256, "batch_rows": 12, "seed": 3},
            "model": {"layers": 2, "width": 64, "heads": 4},
            "optimizer": {"lr": 1e-3, "warmup_steps": 10},
            "training": {
                "steps": self.steps,
                "micro_batch_rows": 3,
                "precision": "fp32",
                "zero_stage": 2,
            },
            "cluster": {
                # Not [1, 2]: Ray keeps a killed driver's places reserved for three minutes then.
                "workers": 2,
                "device": "cpu",
                "worker_resources": {TRAINER: 1},
                "resize_check_s": 600,
                "max_failures": -1,
            },
            "checkpoint": {"every_steps": 5, "keep": 3},
            "evaluation": {"every_steps": 1000, "blocks": 1},
            "tracking": {"log_every": 1, "audit": True, "mode": "disabled"},
        }


def say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def wait_until(condition: Callable[[], Any], what: str) -> None:
    until = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > until:
            raise TimeoutError(f"{what} did not come within {PATIENCE_S:.0f} s")
        time.sleep(0.1)


def live_a_day(folder: Path, args: argparse.Namespace, report: Report) -> None:
    parts = {"training": train, "stop": stop, "slow": slow, "uses": use, "doctor": doctor}
    with Raylets(4) as cluster:
        day = Day(cluster, folder, args.steps)
        if set(args.parts) - {"doctor"}:
            build = ("build_corpus", "--input", day.fasta, "--output", day.corpus)
            assert day.run(*build, "--block-residues", "32768").returncode == 0
        if set(args.parts) & {"training", "stop", "uses"}:
            assert day.run("--detach", *day.plain()).returncode == 0
        for name in args.parts:
            with report.part(name):
                report[name] = parts[name](day)
                say(f"{name}: {report[name]}")


def train(day: Day) -> dict[str, Any]:
    """A node and the driver of a run are killed, while others submit its name."""
    began = time.monotonic()
    command = day.pretraining("wild")
    first = day.start("first.log", *command)
    day.await_step("wild", day.steps // 4)
    second = day.start("second.log", *command)
    many = [day.start(f"{n}.log", *day.pretraining("wild")) for n in range(3)]
    day.cluster.nodes.pop(1).kill()
    say("killed a node")
    at_node = day.await_step("wild", day.steps // 4)  # nothing trains until there is another node
    day.add_trainer()
    day.await_step("wild", max(at_node, day.steps // 2))
    killed = day.kill_driver("wild")
    say(f"killed the driver: {killed}")
    codes = [each.wait(2 * PATIENCE_S) for each in (first, second, *many)]
    attempts = [line.split()[:2] for line in day.run("list").stdout.splitlines()]
    wild = [each for each in attempts if each[0].startswith("wild-")]
    audit = json.loads((day.folder / "wild/audit.json").read_text())
    day.await_plain()
    followed = "is running already" in (day.folder / "second.log").read_text()
    found = {
        "exit_codes": codes,
        "attempts": wild,
        "driver_killed": killed,
        "second_submit_followed": followed,
        "audit_equal": day.rows("wild") == day.rows("plain"),
        "steps": audit["steps"],
        "redone_steps": audit["redone_steps"],
        "starts_of_workers": audit["attempts"],
        "seconds": round(time.monotonic() - began),
    }
    right = killed and followed and found["audit_equal"] and set(codes) == {0}
    right = right and wild == [["wild-1", "FAILED"], ["wild-2", "SUCCEEDED"]]
    return found | {"as_it_should_be": right}


def stop(day: Day) -> dict[str, Any]:
    """A run that saves only when it is told to end is stopped, and submitted again."""
    command = day.pretraining("stopped", checkpoint__every_steps=100_000)
    assert day.run("--detach", *command).returncode == 0
    day.await_step("stopped", 5)
    began = time.monotonic()
    ended = day.run("stop", "stopped")
    seconds = time.monotonic() - began
    status = day.run("status", "stopped").stdout
    last = day.await_step("stopped", 5)
    saved = sorted(path.name for path in (day.folder / "stopped/checkpoints").glob("step-*"))
    again = day.run(*command)
    day.await_plain()
    audit = json.loads((day.folder / "stopped/audit.json").read_text())
    found = {
        "stop_exit_code": ended.returncode,
        "stop_s": round(seconds, 1),
        "status": status.split("\n")[0],
        "last_step": last,
        "saved": saved,
        "exit_code_of_the_next_attempt": again.returncode,
        "redone_steps": audit["redone_steps"],
        "audit_equal": day.rows("stopped") == day.rows("plain"),
    }
    right = (ended.returncode, again.returncode, audit["redone_steps"]) == (0, 0, 0)
    right = (
        right
        and [name.rsplit("-", 2)[0] for name in saved] == [f"step-{last:08d}"]
        and found["audit_equal"]
    )
    return found | {"as_it_should_be": right and "stopped-1: STOPPED" in status}


def slow(day: Day) -> dict[str, Any]:
    """The node of one rank stands still now and then: the job's log must name the rank."""
    command = day.pretraining("slowed", training__steps=1_000_000)
    follower = day.start("slowed.log", *command)
    day.await_step("slowed", 5)
    began = time.monotonic()
    with day.cluster.nodes[-1].slowed():
        log = day.folder / "slowed.log"
        wait_until(lambda: "times as long as the others" in log.read_text(), "the warning")
        seconds = time.monotonic() - began
    stopped = day.run("stop", "slowed")
    lines = (day.folder / "slowed/metrics.jsonl").read_text().splitlines()
    ratios = [json.loads(line).get("speed/slowest_rank_ratio", 1.0) for line in lines]
    warning = next(line for line in log.read_text().splitlines() if "times as long" in line)
    return {
        "named_after_s": round(seconds, 1),
        "warning": warning,
        "greatest_ratio": round(max(ratios), 2),
        "exit_codes": [stopped.returncode, follower.wait(PATIENCE_S)],
        "as_it_should_be": max(ratios) > 1.3,
    }


def use(day: Day) -> dict[str, Any]:
    """The result is served, and embeds proteins beside that; a mistake is one sentence."""
    day.await_plain()
    few = day.folder / "few.fasta"
    few.write_text(">" + ">".join(day.fasta.read_text().split(">")[1 : PROTEINS + 1]))
    port, model = free_port(), str(day.folder / "plain")
    application = {"name": "raptide", "route_prefix": "/", "import_path": "serve.app:build"}
    config = day.folder / "serve.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "proxy_location": "HeadOnly",
                "http_options": {"host": "127.0.0.1", "port": port},
                "applications": [application | {"args": {"model": model}}],
            }
        )
    )
    assert day.run("--detach", "--name", "endpoint", "serve", config).returncode == 0
    bulk = day.run(
        *("embed_proteins", "--model", model, "--input", few),
        *("--output", day.folder / "embeddings"),
    )
    url = f"http://127.0.0.1:{port}"
    answers: list[int] = []

    def answered() -> bool:
        try:
            body = {"input": ["MKTAYIAKQR"]}
            answers.append(httpx.post(f"{url}/v1/embeddings", json=body, timeout=30).status_code)
        except httpx.HTTPError:
            return False
        return answers[-1] == 200

    wait_until(answered, "an answer of the endpoint")
    stopped = day.run("stop", "endpoint")
    wrong = day.run("embed_proteins", "--model", "/nowhere", "--input", few, "--output", "/x/y")
    sentences = [line for line in wrong.stderr.splitlines() if line.startswith("error: ")]
    inside = day.run("embed_proteins", "--model", model, "--input", few, "--output", "here")
    parts = list((day.folder / "embeddings").rglob("*.parquet"))
    codes = (bulk.returncode, stopped.returncode, wrong.returncode, inside.returncode)
    return {
        "bulk": bulk.stdout.strip().splitlines()[:1],
        "parts": len(parts),
        "endpoint_answered": answers[-1],
        "error": sentences,
        "output_in_the_copy": inside.stderr.strip().splitlines()[-1:],
        "exit_codes": codes,
        "as_it_should_be": codes == (0, 0, 2, 2) and len(sentences) == 1 and bool(parts),
    }


def doctor(day: Day) -> dict[str, Any]:
    """As it is; then with nodes that lack disk, run another Ray and stand still now and then."""
    for node in day.cluster.nodes[1:]:
        node.kill()
    del day.cluster.nodes[1:]
    metadata = day.folder / f"other/ray-{OTHER_RAY}.dist-info/METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: ray\nVersion: {OTHER_RAY}\n")
    elsewhere = Path("/dev/shm") / day.folder.name
    elsewhere.mkdir()
    try:
        free = {place: shutil.disk_usage(place).free / 1e9 for place in ("/tmp", "/dev/shm")}
        disk_gb = (free["/tmp"] + free["/dev/shm"]) / 2
        slow = day.cluster.add(1)
        fit = _check(day, 1.0)
        day.cluster.add(1, PYTHONPATH=str(metadata.parents[1]))
        day.cluster.add(1, TMPDIR=str(elsewhere))
        with slow.slowed():
            odd = _check(day, disk_gb)
    finally:
        shutil.rmtree(elsewhere)
    named = {
        check: sorted({each["node"] for each in odd["findings"] if each["check"] == check})
        for check in ("versions", "disk", "matrix product")
    }
    other, lacking, slow_one = named.values()
    told = {each["check"]: each["found"] for each in odd["findings"]}
    right = fit["ok"] and not odd["ok"] and odd["exit_code"] == 1 and fit["exit_code"] == 0
    right = right and len(other) == len(slow_one) == 1 and slow_one != other
    shm_is_smaller = free["/dev/shm"] < free["/tmp"]
    if shm_is_smaller:
        right = right and len(lacking) == 1 and lacking not in (other, slow_one)
    return {
        "fit": fit,
        "odd": {"named": named, "found": told, "measures": odd["measures"]},
        "seconds": [round(each["seconds"]) for each in (fit, odd)],
        "as_it_should_be": right,
    }


def _check(day: Day, disk_gb: float) -> dict[str, Any]:
    expected = len(day.cluster.nodes)
    day.cluster.await_nodes(expected)
    storage = day.folder / "storage"
    done = day.run(
        *("--address", day.cluster.url, "--json", f"--disk-gb={disk_gb:.0f}"),
        *("--storage", storage),
        script="check_cluster",
    )
    found = json.loads(done.stdout)
    assert len(found["nodes"]) == expected, found["findings"]
    nodes = found.pop("nodes")
    return found | {"exit_code": done.returncode, "nodes": sorted(nodes)}
