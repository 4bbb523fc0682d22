"""Load a deployed endpoint and see how it copes: throughput, latency, errors.

    python jobs/load_test.py http://127.0.0.1:8000
    python jobs/load_test.py http://127.0.0.1:8000 --clients 1 8 32 128 --input my.fasta
    python jobs/load_test.py http://127.0.0.1:8000 --rate 5 10 20 40 --json load.json
    RAPTIDE_API_KEY=... python jobs/load_test.py https://proteins.example.org

Every level runs for --duration seconds after a warm-up that does not count.

    --clients N ...   closed loop: N clients, each sends again when it is answered. Finds the most
                      the endpoint can do; its latency is that of a queue of N.
    --rate R ...      open loop: R requests a second at random times (Poisson), answered or not, as
                      users come. Finds the latency they would see. Choose rates below the most.

Requests ask for embeddings (mean, base64) of one protein each, or what the options below say.
Proteins have natural lengths: those of a FASTA file, or random ones with UniRef's. Any endpoint
that speaks OpenAI's embeddings protocol can be tested. The API key is taken from RAPTIDE_API_KEY.

Run it from another machine than the endpoint's, or it takes CPU time from what it measures; the
table warns if the generator itself is the limit.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import tqdm

from commandline import as_called, job_parser, run_job
from raptide import Client, ConfigError, ServiceError
from raptide.load.levels import Level, LoadGenerator, Request
from raptide.load.report import HEADER, draw_load, summarise, table_line
from raptide.load.requests import embedding_requests, read_proteins, score_requests

CLIENTS = [1, 4, 16, 64]
BUSY_GENERATOR = 0.8


def main() -> None:
    args = parse_arguments()
    key = os.environ.get("RAPTIDE_API_KEY") or None
    model = find_model(args.url, key, args.model)
    longest = min(args.longest, model.get("max_residues", args.longest))
    proteins = read_proteins(args.input, args.proteins, longest)
    print(
        f"{args.url} serves {model['id']}. {len(proteins):,} proteins of "
        f"{min(map(len, proteins))} to {max(map(len, proteins))} residues, median "
        f"{median(map(len, proteins)):.0f}; {args.sequences} in a request.\n\n{HEADER}"
    )
    generator = LoadGenerator(args.url, make_requests(args, proteins), key, args.timeout)
    levels = [Level(clients=n) for n in args.clients] + [Level(rate=rate) for rate in args.rate]
    results = [measure(generator, level, args) for level in levels]
    write(args, model, proteins, results)
    print_summary(args, results)


def parse_arguments() -> argparse.Namespace:
    parser = job_parser(__doc__)
    parser.add_argument("url", metavar="URL", help="of the endpoint")
    group = parser.add_argument_group("how much load")
    group.add_argument(
        "--clients",
        type=int,
        nargs="+",
        metavar="N",
        help=f"closed loop (default: {' '.join(map(str, CLIENTS))}, or none with --rate)",
    )
    group.add_argument(
        "--rate", type=float, nargs="+", metavar="R", help="open loop, requests a second"
    )
    group.add_argument(
        "--duration", type=float, default=20.0, metavar="S", help="seconds of each level"
    )
    group.add_argument(
        "--warmup", type=float, default=3.0, metavar="S", help="seconds before each level"
    )
    group = parser.add_argument_group("what is sent")
    group.add_argument(
        "--input", type=Path, metavar="FASTA", help="proteins (default: random ones)"
    )
    group.add_argument("--proteins", type=int, default=1000, metavar="N", help="how many of them")
    group.add_argument(
        "--longest", type=int, default=1022, metavar="N", help="leave out those of more residues"
    )
    group.add_argument("--sequences", type=int, default=1, metavar="N", help="in one request")
    group.add_argument(
        "--call", choices=("embeddings", "scores"), default="embeddings", help="what is asked for"
    )
    group.add_argument(
        "--pooling", choices=("mean", "bos", "residue"), help="of embeddings (default: mean)"
    )
    group.add_argument(
        "--encoding",
        choices=("base64", "float", "arrow"),
        default="base64",
        help="of the answers' numbers",
    )
    group.add_argument("--model", metavar="NAME", help="default: the endpoint's first")
    group.add_argument(
        "--timeout", type=float, default=300.0, metavar="S", help="seconds of one request"
    )
    group = parser.add_argument_group("what is written")
    group.add_argument("--json", type=Path, metavar="FILE", help="all figures")
    group.add_argument(
        "--picture", type=Path, default=Path("load.png"), metavar="PNG", help="latency against load"
    )
    args = parser.parse_args()
    args.url = args.url.rstrip("/").removesuffix("/v1")
    if args.clients is None:
        args.clients = [] if args.rate else CLIENTS
    args.rate = args.rate or []
    for name in ("clients", "rate", "duration", "proteins", "longest", "sequences", "timeout"):
        value = getattr(args, name)
        for each in value if isinstance(value, list) else [value]:
            if not 0 < each < float("inf"):
                raise ConfigError(f"--{name} must be above 0, but {each:g} was given.")
    if not 0 <= args.warmup < float("inf"):
        raise ConfigError(f"--warmup must be 0 or more, but {args.warmup:g} was given.")
    return args


def find_model(url: str, key: str | None, name: str | None) -> dict[str, Any]:
    """What the endpoint says of the model; fails at once where there is no endpoint."""
    with Client(url, key, retry_s=0, timeout_s=30) as client:
        models = client.models()
    found = [model for model in models if name in (None, model["id"])]
    if not found:
        served = ", ".join(repr(model["id"]) for model in models) or "none"
        raise ConfigError(f"The endpoint serves {served}, but --model {name} was given.")
    return found[0]


def make_requests(args: argparse.Namespace, proteins: list[str]) -> Iterator[Request]:
    fields = {"model": args.model, "pooling": args.pooling}
    given = {name: value for name, value in fields.items() if value is not None}
    if args.call == "embeddings":
        return embedding_requests(proteins, args.sequences, args.encoding, **given)
    if args.pooling is not None:
        raise ConfigError("--pooling goes with --call embeddings; leave it out for scores.")
    return score_requests(proteins, args.sequences, **given)


def measure(generator: LoadGenerator, level: Level, args: argparse.Namespace) -> dict[str, Any]:
    """Run a level and print its line."""
    total = args.warmup + args.duration
    with tqdm(
        total=total,
        desc=str(level),
        leave=False,
        disable=None,
        bar_format="{desc} |{bar}| {n:.0f}/{total:.0f} s",
    ) as bar:
        measured = generator.run(
            level,
            duration_s=args.duration,
            warmup_s=args.warmup,
            tick=lambda seconds: bar.update(seconds - bar.n),
        )
    result = summarise(measured)
    print(table_line(result), flush=True)
    return result


def write(
    args: argparse.Namespace,
    model: dict[str, Any],
    proteins: list[str],
    results: list[dict[str, Any]],
) -> None:
    if len(results) > 1:
        draw_load(results, f"{model['id']} at {args.url}", args.picture)
    if args.json is not None:
        report = {
            "url": args.url,
            "model": model,
            "call": args.call,
            "encoding": args.encoding,
            "pooling": args.pooling or "mean",
            "sequences_per_request": args.sequences,
            "proteins": {"count": len(proteins), "residues": sum(map(len, proteins))},
            "levels": results,
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n")


def print_summary(args: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    """What the figures say, and what to try next."""
    if not any(each["requests_per_s"] for each in results):
        problems = sorted({what for each in results for what in each["errors"]})
        raise ServiceError(
            f"{args.url} answered no request in time ({', '.join(problems) or 'too slow'}); see "
            "the endpoint's log, or try a longer --duration."
        )
    print()
    best = max(results, key=lambda each: each["residues_per_s"])
    enough = next(e for e in results if e["residues_per_s"] >= 0.9 * best["residues_per_s"])
    print(
        f"Most: {best['residues_per_s']:,.0f} residues/s, {best['requests_per_s']:,.1f} requests/s."
    )
    if enough is not results[-1]:
        print(f"{enough['load']} reach 90% of it; beyond that it is mostly waiting that grows.")
    if any(each["generator_cpu"] > BUSY_GENERATOR for each in results):
        print("The generator used a whole core: start several on other machines to see more.")
    if any(set(each["errors"]) - {"429"} for each in results):
        print("There were errors other than 429 (full): the endpoint's log says why.")
    if args.json is not None:
        print(f"All figures: {args.json}")
    if len(results) > 1:
        print(f"Latency against load: {args.picture}")
    if not args.rate:
        rates = " ".join(f"{best['requests_per_s'] * share:.2g}" for share in (0.5, 0.7, 0.9))
        print(
            "\nNext, the latency users would see at 50%, 70% and 90% of that:\n"
            + as_called(f"  python jobs/load_test.py {args.url} --rate {rates}")
        )


if __name__ == "__main__":
    run_job(main)
