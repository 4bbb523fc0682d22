"""The parts of bench_serving.py: each starts its servers and puts load on them."""

from __future__ import annotations

import argparse
import http.client
import json
import re
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bench_engine import write_inputs
from by_hand import Report
from machine import CORES
from servers import (
    EngineAlone,
    Server,
    find_haproxy,
    infinity_server,
    install_infinity,
    plain_server,
    raptide_server,
)

from raptide import RaptideError
from raptide.load.levels import Level, LoadGenerator, Measured
from raptide.load.report import HEADER, draw_load, summarise, table_line
from raptide.load.requests import embedding_requests

PEERS = {
    "FastAPI": "vs_plain_fastapi",
    "FastAPI, one at a time": "vs_plain_fastapi_one_at_a_time",
    "infinity": "vs_embedding_server",
}
"""Other servers, and the name of the ratio of raptide's throughput to theirs."""

LEVEL_CLIENTS, LEVEL_SHARES = (1, 4, 16, 64), (0.3, 0.5, 0.7, 0.9)
SOAK_CLIENTS, SOAK_SAMPLE_S = 256, 10.0


def measure(folder: Path, args: argparse.Namespace, report: Report) -> None:
    sequences = write_inputs(folder, args.preset, args.sequences)
    report |= {
        "preset": args.preset,
        "sequences": len(sequences),
        "residues": sum(map(len, sequences)),
        "clients": args.clients,
    }
    report.setdefault("ratios", {})
    for part in args.parts:
        with report.part(part):
            MEASURES[part](folder, sequences, args, report)


def measure_engine(
    folder: Path, sequences: list[str], args: argparse.Namespace, report: Report
) -> None:
    found = report["engine"] = {}
    ratios = report["ratios"]
    for name, replicas in (("", CORES), ("_one_replica", 1)):
        model = folder / "model"
        with raptide_server(model, folder, replicas=replicas) as server, EngineAlone(model) as bare:
            rounds = found[f"rounds{name}"] = []
            for _ in range(args.rounds):
                rounds.append(engine_round(server, bare, sequences, args))
        ratios[f"http_vs_engine{name}"] = median_of(rounds, "ratio")
        # This one does not see idle cores, but neither does it see what else the machine does.
        ratios[f"http_vs_engine_by_cpu_time{name}"] = median_of(rounds, "ratio_by_cpu_time")


def engine_round(
    server: Server, bare: EngineAlone, sequences: list[str], args: argparse.Namespace
) -> dict[str, Any]:
    """A window of load, then as long of the bare engine."""
    level = load(server, sequences, Level(clients=args.clients), args.seconds)
    before, seconds, residues = bare.cpu_s(), 0.0, 0
    while seconds < args.seconds:
        seconds += bare.embed(sequences)
        residues += sum(map(len, sequences))
    cpu_ms = 1e3 * (bare.cpu_s() - before) / residues
    level["engine_residues_per_s"] = residues / seconds
    level["ratio"] = level["residues_per_s"] / level["engine_residues_per_s"]
    level["ratio_by_cpu_time"] = cpu_ms / level["cpu_ms_per_residue"]
    print(
        f"engine: HTTP {level['residues_per_s']:,.0f}, alone {residues / seconds:,.0f} residues/s, "
        f"ratio {level['ratio']:.3f}, CPU-ms a request {level['cpu_ms']}",
        flush=True,
    )
    return level


def median_of(rounds: list[dict[str, Any]], key: str) -> float:
    return round(statistics.median(each[key] for each in rounds), 3)


def measure_peers(
    folder: Path, sequences: list[str], args: argparse.Namespace, report: Report
) -> None:
    model = folder / "model"
    environment = args.infinity or folder / "infinity"
    if args.quick and args.infinity is None:
        missing: str | None = "installing it takes longer than a quick run may; give --infinity"
    else:
        missing = install_infinity(environment)
    if missing is not None:
        report.leave_out("infinity", missing)
    with ExitStack() as stack:
        start = stack.enter_context
        servers = [
            start(raptide_server(model, folder, replicas=CORES)),
            start(plain_server(model, folder)),
            start(plain_server(model, folder, "--one-at-a-time")),
        ]
        if missing is None:
            servers.append(start(infinity_server(environment, model, folder)))
        rounds: dict[str, list[dict[str, Any]]] = {server.name: [] for server in servers}
        report["peers"] = {"rounds": rounds, "infinity_missing": missing}
        for _ in range(args.rounds):
            for server in servers:
                level = load(server, sequences, Level(clients=args.clients), args.seconds)
                rounds[server.name].append(level)
                print(
                    f"peers: {server.name} {level['residues_per_s']:,.0f} residues/s "
                    f"{level['errors'] or ''}",
                    flush=True,
                )
    for server in servers[1:]:
        report["ratios"][PEERS[server.name]] = ratio = against(server.name, rounds)
        if ratio is None:
            print(f"peers: {server.name} answered nothing in some window; give more --seconds")


def against(peer: str, rounds: dict[str, list[dict[str, Any]]]) -> float | None:
    """Median over the rounds of how many times more residues raptide answered.

    None if the peer answered nothing in a round: its requests took longer than the window.
    """
    pairs = zip(rounds["raptide"], rounds[peer], strict=True)
    speeds = [(ours["residues_per_s"], theirs["residues_per_s"]) for ours, theirs in pairs]
    if not all(theirs for _, theirs in speeds):
        return None
    return round(statistics.median(ours / theirs for ours, theirs in speeds), 3)


def load(
    server: Server, sequences: list[str], level: Level, seconds: float, warmup_s: float = 5.0
) -> dict[str, Any]:
    """A window of load, with CPU-ms for each answered request by role."""
    samples = []

    def tick(passed: float) -> None:
        # Reading takes time from the load: at the window's begin and end only.
        if passed >= warmup_s + seconds or (not samples and passed >= warmup_s):
            samples.append(server.cpu_s())

    requests = embedding_requests(sequences, 1, "base64", **model_named(server))
    generator = LoadGenerator(server.url, requests, server.key, 600.0)
    measured = generator.run(level, duration_s=seconds, warmup_s=warmup_s, tick=tick)
    result = summarise(measured)
    count = max(1, len(answered_of(measured)))
    first, last = samples[0], samples[-1]
    result["cpu_ms"] = {
        role: round(1e3 * (last[role] - first.get(role, 0.0)) / count, 1) for role in last
    }
    spent = sum(last.values()) - sum(first.values())
    residues = sum(each.residues for each in answered_of(measured))
    result["cpu_ms_per_residue"] = 1e3 * spent / max(1, residues)
    return result


def model_named(server: Server) -> dict[str, str]:
    return {"model": "infinity"} if server.name == "infinity" else {}


def answered_of(measured: Measured) -> list[Any]:
    return [each for each in measured.outcomes if each.problem is None]


def measure_latency(
    folder: Path, sequences: list[str], args: argparse.Namespace, report: Report
) -> None:
    """Added milliseconds of single requests; the proteins are those of at most median length."""
    shorter = sorted(sequences, key=len)[: len(sequences) // 2]
    modes: dict[str, str | None] = {"default": None}
    if (haproxy := find_haproxy()) is not None:
        modes["haproxy"] = haproxy
    else:
        report.leave_out("haproxy", "there is no program of that name on the PATH or in /usr/sbin")
    found = report["latency"] = {}
    ratios = report["ratios"]
    for name, binary in modes.items():
        try:
            with raptide_server(folder / "model", folder, haproxy=binary) as server:
                found[name] = added_latency(server, folder / "model", shorter, args.rounds)
        except RaptideError as error:  # HAProxy's configuration depends on its version
            if binary is None:
                raise
            report.leave_out(name, str(error))
            continue
        added, outside = found[name]["added_ms"], found[name]["outside_compute_ms"]
        print(f"latency: {name} adds {added:.1f} ms, {outside:.1f} outside computing", flush=True)
        suffix = "" if name == "default" else f"_{name}"
        ratios[f"added_latency_ms{suffix}"] = round(added, 2)
        ratios[f"outside_compute_ms{suffix}"] = round(outside, 2)


def added_latency(server: Server, model: Path, sequences: list[str], rounds: int) -> dict[str, Any]:
    client = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=120.0)
    with EngineAlone(model) as bare, closing(client):
        ask = partial(one_request, client, server.key)
        rows = [one_protein(ask, bare, each) for _ in range(rounds + 1) for each in sequences]
    measured = rows[len(sequences) :]  # the first round warms up
    added = [whole - engine for whole, _, engine in measured]
    return {
        "http_ms": statistics.median(whole for whole, _, _ in measured),
        "engine_ms": statistics.median(engine for _, _, engine in measured),
        "added_ms": statistics.median(added),
        "added_ms_quartiles": statistics.quantiles(added, n=4),
        "outside_compute_ms": statistics.median(whole - compute for whole, compute, _ in measured),
        "requests": len(measured),
    }


def one_protein(
    ask: Callable[[str], tuple[float, float]], bare: EngineAlone, sequence: str
) -> tuple[float, float, float]:
    """Milliseconds by HTTP, of these what the replica says it computed, and by the bare engine.

    A client asks again when it has its answer, so the second of two requests counts (nothing is
    cached): the first would also show the time that processes take to wake up after the other
    side's turn. Turns are short because the machine's speed changes within seconds.
    """
    _, (whole, compute) = ask(sequence), ask(sequence)
    _, alone = bare.embed([sequence]), bare.embed([sequence])
    return whole, compute, 1e3 * alone


def one_request(
    client: http.client.HTTPConnection, key: str | None, sequence: str
) -> tuple[float, float]:
    """Milliseconds of a request and of its computing; the client is lean, since its time counts."""
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    started = time.perf_counter()
    body = json.dumps({"input": sequence, "encoding_format": "base64"})
    client.request("POST", "/v1/embeddings", body, headers)
    answer = client.getresponse()
    answer.read()
    whole = time.perf_counter() - started
    if answer.status != 200:
        raise RaptideError(f"{client.host}:{client.port} answered {answer.status}.")
    compute = re.search(r"compute;dur=([\d.]+)", answer.headers["Server-Timing"])
    assert compute is not None
    return 1e3 * whole, float(compute[1])


def measure_levels(
    folder: Path, sequences: list[str], args: argparse.Namespace, report: Report
) -> None:
    """The closed loop up to more clients than help, then the open loop below what that reached."""
    print(HEADER)
    levels: list[dict[str, Any]] = []
    report["levels"] = levels
    with raptide_server(folder / "model", folder, replicas=CORES) as server:

        def measure(level: Level) -> None:
            levels.append(load(server, sequences, level, args.seconds))
            print(table_line(levels[-1]), flush=True)

        for clients in LEVEL_CLIENTS:
            measure(Level(clients=clients))
        most = max(level["requests_per_s"] for level in levels)
        for share in LEVEL_SHARES:
            measure(Level(rate=round(share * most, 2)))
    draw_load(levels, f"{args.preset}, {CORES} CPU cores", args.picture)


def measure_soak(
    folder: Path, sequences: list[str], args: argparse.Namespace, report: Report
) -> None:
    """Many clients for minutes: errors, and memory once a fifth has passed and at the end."""
    seconds = args.soak_seconds
    memory: list[tuple[float, dict[str, float]]] = []
    with raptide_server(folder / "model", folder, replicas=CORES) as server:

        def tick(passed: float) -> None:
            if not memory or passed - memory[-1][0] >= SOAK_SAMPLE_S or passed >= seconds:
                memory.append((passed, server.memory_mb()))
                print(f"soak: {passed:.0f} s, MB {memory[-1][1]}", flush=True)

        requests = embedding_requests(sequences, 1, "base64")
        generator = LoadGenerator(server.url, requests, server.key, 600.0)
        level = Level(clients=SOAK_CLIENTS)
        measured = generator.run(level, duration_s=seconds, warmup_s=0.0, tick=tick)
    result = report["soak"] = summarise(measured)
    result["memory_mb"] = [{"s": round(s), **by_role} for s, by_role in memory]
    settled = next(by_role for s, by_role in memory if s >= seconds / 5)
    grown = {role: memory[-1][1][role] / settled[role] for role in settled}
    for role, factor in grown.items():
        report["ratios"][f"soak_memory_growth_{role}"] = round(factor, 3)


MEASURES = {
    "engine": measure_engine,
    "peers": measure_peers,
    "latency": measure_latency,
    "levels": measure_levels,
    "soak": measure_soak,
}
"""What fills each part of a report, also when it is interrupted, and the ratios."""
