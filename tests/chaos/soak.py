"""What serve_soak.py does: clients of every kind, deaths and updates, and the books at the end."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import grpc
import httpx
import psutil
import ray
from breakages import bundle
from by_hand import Report
from ray import serve as ray_serve
from steady_load import say

from processes import free_port
from raptide.cluster import ray_session
from serve.app import build
from serve.gateway.keys import make_key
from serve.rpc import raptide_pb2 as pb
from serve.rpc.raptide_pb2_grpc import RaptideStub

SERVICER = "serve.rpc.service.add_service"
ROLLOUTS = (2, 3, 4)
"""Steps of the checkpoints that take over."""

BATCH_TOKENS = 512
SHORT = ["MKTAYIAKQR" * 5] * 3
MANY = ["LAGVSERTID" * 50] * 64
"""Each fills a batch."""
COSTLY = "LAGVSERTID" * 40
"""400 masked passes."""

ARROW = {"Accept": "application/vnd.apache.arrow.stream"}
SAMPLE_S = 5.0
EXPORTED_S = 90.0
"""How long numbers may take to Prometheus' port."""

LEFT = ("499", "disconnected")
"""Types of errors of clients that hung up."""

ROLES = {"gateway": ":Gateway", "replica": ":replica-", "proxy": "ProxyActor"}
"""What the processes' names hold."""


class Books:
    """What was asked and answered, by kind of client and by call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.kinds: dict[str, Counter[str]] = defaultdict(Counter)
        self.calls: Counter[tuple[str, str]] = Counter()
        """By call and status; "?" where the client left before it knew."""
        self.types: Counter[str] = Counter()
        """Errors by type."""
        self.residues: Counter[str] = Counter()
        """That were let in, by call; not those of clients that left."""

    def write(self, kind: str, call: str, status: str, error: str | None, residues: int) -> None:
        with self._lock:
            self.kinds[kind][status] += 1
            self.calls[call, status] += 1
            if error is not None:
                self.types[error] += 1
            self.residues[call] += residues


def soak(folder: Path, minutes: float, report: Report) -> None:
    with ray_session(num_cpus=6), endpoint(folder) as (url, grpc_address, key):
        books, stop = Books(), threading.Event()
        clients = [
            threading.Thread(target=client, args=(books, stop))
            for client in kinds_of_clients(url, grpc_address, key)
        ]
        memory = Memory()
        with report.part("load"):
            for thread in clients:
                thread.start()
            try:
                report |= live(folder, 60 * minutes, memory)
            finally:
                stop.set()
                for thread in clients:
                    thread.join()
            report["kinds"] = {kind: dict(counts) for kind, counts in sorted(books.kinds.items())}
            report["requests"] = sum(books.calls.values())
            report["failed"] = failures(books)
            report["memory"] = {"growth": memory.growth(), "samples": memory.samples}
        with report.part("books"):
            report["books"] = compare(books)


@contextmanager
def endpoint(folder: Path) -> Iterator[tuple[str, str, str]]:
    """Two replicas behind HTTP and gRPC; their addresses, and a key."""
    port, grpc_port = free_port(), free_port()
    key, line = make_key("soak")
    (folder / "keys").write_text(line)
    ray_serve.start(
        http_options={"host": "127.0.0.1", "port": port},
        grpc_options={"port": grpc_port, "grpc_servicer_functions": [SERVICER]},
    )
    deploy(folder, 1)
    yield f"http://127.0.0.1:{port}", f"127.0.0.1:{grpc_port}", key
    ray_serve.shutdown()


def deploy(folder: Path, step: int) -> None:
    arguments = {
        "model": str(bundle(folder / str(step), step)),
        "keys_file": str(folder / "keys"),
        "replicas": 2,
        "max_batch_tokens": BATCH_TOKENS,
        "max_queued_tokens": 4_000_000,
    }
    ray_serve.run(build(arguments), name="soak")


def live(folder: Path, seconds: float, memory: Memory) -> dict[str, Any]:
    """Let time pass: replicas die, checkpoints take over, memory is looked at."""
    began = time.monotonic()
    kill_every = max(60.0, seconds / 20)  # more often, and Serve gives an update up
    done: list[int] = []
    every_s = seconds / (len(ROLLOUTS) + 1)
    updates = threading.Thread(target=update, args=(folder, every_s, done))
    updates.start()
    next_kill, next_sample, kills = kill_every, 0.0, 0
    handle = ray_serve.get_deployment_handle("replica-raptide", "soak")
    while (now := time.monotonic() - began) < seconds or updates.is_alive():
        if now >= next_sample:
            memory.look(now)
            next_sample = now + SAMPLE_S
        if now >= next_kill:
            kills += kill_one(handle)
            next_kill = time.monotonic() - began + kill_every
        time.sleep(0.2)
    assert len(done) == len(ROLLOUTS), f"only checkpoints {done} of {ROLLOUTS} took over"
    return {"seconds": round(now, 1), "kills": kills, "rollouts": len(done)}


def update(folder: Path, every_s: float, done: list[int]) -> None:
    """Let each checkpoint take over, `every_s` after the last one or once that is through.

    Args:
        done: takes those that have.
    """
    due = time.monotonic()
    for step in ROLLOUTS:
        due += every_s
        time.sleep(max(0.0, due - time.monotonic()))
        say(f"step {step} takes over")
        deploy(folder, step)
        done.append(step)


def kill_one(handle: Any) -> int:
    try:
        pid = handle.process.remote().result(timeout_s=20)["pid"]
    except Exception as error:  # it has just died
        say(f"nobody was killed ({type(error).__name__})")
        return 0
    os.kill(pid, signal.SIGKILL)
    say(f"killed replica {pid}")
    return 1


class Memory:
    """Memory of the processes of each role, MB of their own (USS), summed."""

    def __init__(self) -> None:
        self.samples: list[dict[str, float]] = []

    def look(self, now: float) -> None:
        sample = {"seconds": round(now, 1)}
        for process in psutil.Process().children(recursive=True):
            try:
                name = process.cmdline()[0]
                held_mb = process.memory_full_info().uss / 1e6
            except (psutil.Error, IndexError):
                continue
            for role, part in ROLES.items():
                if part in name:
                    sample[role] = round(sample.get(role, 0.0) + held_mb, 1)
        self.samples.append(sample)

    def growth(self) -> dict[str, dict[str, float]]:
        """Median of the second and of the last quarter of the time."""
        quarter = max(1, len(self.samples) // 4)
        found = {}
        for role in ROLES:
            early, late = (
                sorted(sample.get(role, 0.0) for sample in samples)
                for samples in (self.samples[quarter : 2 * quarter], self.samples[-quarter:])
            )
            if early and late:
                middle = (early[len(early) // 2], late[len(late) // 2])
                found[role] = dict(zip(("early_mb", "late_mb"), middle, strict=True))
        return found


Client = Callable[[Books, threading.Event], None]


def kinds_of_clients(url: str, grpc_address: str, key: str) -> Iterator[Client]:
    """One client of each kind, of the first two."""
    embeddings, scores = "/v1/embeddings", "/v1/scores"
    base64 = {"encoding_format": "base64"}
    one_run = {"input": SHORT, **base64}
    residues = {"input": ["MKTAYIAKQR" * 20] * 2, "pooling": "residue"}
    late = {"X-Raptide-Timeout-S": "0.02"}
    wrong = {"Authorization": "Bearer rpt_wrong"}

    def http(kind: str, path: str, body: dict, **more: Any) -> Client:
        return lambda books, stop: ask_by_http(books, stop, url, key, kind, path, body, **more)

    yield http("one run", embeddings, one_run)
    yield http("one run", embeddings, one_run)
    yield http("64 runs", embeddings, {"input": MANY, **base64}, pause_s=1.0)
    yield http("arrow", embeddings, residues, headers=ARROW)
    yield http("json", embeddings, residues, pause_s=0.2)
    yield http("cancelled", scores, {"sequences": COSTLY}, leave_s=0.1, pause_s=1.0)
    yield http("late", scores, {"sequences": COSTLY}, headers=late, pause_s=0.5)
    yield http("bad letters", embeddings, {"input": "M1"}, pause_s=0.1)
    yield http("bad key", embeddings, one_run, headers=wrong, pause_s=0.2)
    yield http("bad path", "/v1/nothing", one_run, pause_s=0.2)
    yield lambda books, stop: ask_by_grpc(books, stop, grpc_address, key)


def ask_by_http(
    books: Books,
    stop: threading.Event,
    url: str,
    key: str,
    kind: str,
    path: str,
    body: dict,
    *,
    headers: dict[str, str] | None = None,
    leave_s: float | None = None,
    pause_s: float = 0.05,
) -> None:
    """Ask until `stop`.

    Args:
        leave_s: hang up after so long.
    """
    keyed = {"Authorization": f"Bearer {key}"} | (headers or {})
    given = body.get("input", body.get("sequences", ""))
    letters = sum(map(len, [given] if isinstance(given, str) else given))
    call = path.rsplit("/", 1)[-1] if path != "/v1/nothing" else "other"
    with httpx.Client(base_url=url, timeout=leave_s or 180.0, headers=keyed) as client:
        while not stop.wait(pause_s):
            error = None
            try:
                answer = client.post(path, json=body)
                status = str(answer.status_code)
                if answer.status_code >= 400:
                    error = answer.json()["error"]["type"]
            except httpx.TimeoutException:
                status = "?" if leave_s else "timeout"
            except (httpx.TransportError, ValueError, KeyError, TypeError) as broken:
                status = type(broken).__name__
            let_in = letters if status in ("200", "504") else 0
            books.write(kind, call, status, error, let_in)


def ask_by_grpc(books: Books, stop: threading.Event, address: str, key: str) -> None:
    metadata = [("application", "soak"), ("authorization", f"Bearer {key}")]
    request = pb.EmbedRequest(sequences=SHORT)
    with grpc.insecure_channel(address) as channel:
        stub = RaptideStub(channel)
        while not stop.wait(0.05):
            try:
                parts = list(stub.Embed(request, metadata=metadata, timeout=180))
                whole = sum(len(part.arrays) for part in parts) == len(SHORT)
                status = "OK" if whole else "fewer arrays"
            except grpc.RpcError as error:
                status = error.code().name
            books.write("grpc", "embeddings", status, None, sum(map(len, SHORT)))


EXPECTED = {
    "cancelled": {"?"},
    "late": {"504"},
    "bad letters": {"422"},
    "bad key": {"401"},
    "bad path": {"404"},
    "grpc": {"OK"},
}


def failures(books: Books) -> int:
    """Answers that were other than they should have been."""
    return sum(
        count
        for kind, counts in books.kinds.items()
        for status, count in counts.items()
        if status not in EXPECTED.get(kind, {"200"})
    )


def compare(books: Books) -> dict[str, Any]:
    """The books of the endpoint and ours, once they agree or have had time to."""
    until = time.monotonic() + EXPORTED_S
    while (differences := differing(books, read_metrics())) and time.monotonic() < until:
        time.sleep(2)
    return {
        "equal": not differences,
        "differences": differences,
        "calls": {f"{call} {status}": n for (call, status), n in sorted(books.calls.items())},
        "types": dict(books.types),
        "residues": dict(books.residues),
    }


def differing(books: Books, theirs: dict[str, Counter]) -> list[str]:
    """Every line in which the books differ.

    Whoever hung up did not hear of any answer, and may have been gone before the gateway saw a
    request: 499 or 200 stand for those that arrived, which may be fewer.
    """
    told = {(c, "200" if s == "OK" else s): 0 for c, s in books.calls if s != "?"}
    for (call, status), count in books.calls.items():
        if status != "?":
            told[call, "200" if status == "OK" else status] += count
    gone = {call: count for (call, status), count in books.calls.items() if status == "?"}
    requests = Counter(theirs["requests"])
    for call in gone:  # theirs alone hang up, and nobody else of that call hears a 200
        requests[call, "200"] += requests.pop((call, "499"), 0)
    found = []
    for call, status in sorted({*told, *requests}):
        ours, more = told.get((call, status), 0), requests[call, status]
        allowed = gone.get(call, 0) if status == "200" else 0
        if not ours <= more <= ours + allowed:
            found.append(f"requests {call} {status}: {more - ours:+}")
    errors = Counter(books.types)
    errors.subtract({kind: n for kind, n in theirs["errors"].items() if kind not in LEFT})
    found += [f"errors {kind}: {-n:+}" for kind, n in errors.items() if n]
    for call, letters in books.residues.items():
        ours, more = letters, theirs["residues"][call]
        if not ours <= more <= ours + gone.get(call, 0) * len(COSTLY):
            found.append(f"residues {call}: {more - ours:+}")
    return found


def read_metrics() -> dict[str, Counter]:
    """Requests by call and status, errors by type, residues by call, as Prometheus reads them."""
    port = ray.nodes()[0]["MetricsExportPort"]
    text = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=30).text
    found: dict[str, Counter] = {"requests": Counter(), "errors": Counter(), "residues": Counter()}
    for name, labels, value in re.findall(
        r"^ray_raptide_(requests|errors|residues)_total\{(.*)\} (\S+)$", text, re.MULTILINE
    ):
        tags = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        key: Any = tags.get("type", tags.get("call"))
        if name == "requests":
            key = (tags["call"], tags["status"])
        found[name][key] += round(float(value))
    return found
