"""Embed every protein of FASTA files into one Parquet file.

    python jobs/embed_proteins.py --model runs/demo --input my.fasta --output embeddings.parquet
    zcat *.fasta.gz | python jobs/embed_proteins.py --model runs/demo --input - --output e.parquet

Columns: `id` (the record's name, as it stands), `length` (residues) and `embedding` (fp32, mean
over the residues), in the order of the input. The numbers are those of the engine and the endpoint.

Standard input (-) and pipes are read as they come, plain or compressed.

A protein longer than the model takes whole ends the job with its name; with --long window it is
embedded in overlapping windows of 1,022 residues, weights tapering towards their ends.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray.util.queue import Full, Queue
from tqdm import tqdm

from commandline import (
    add_reading_options,
    job_parser,
    reading_rules,
    refuse_output,
    run_job,
)
from raptide.alphabet import decode_residues
from raptide.cluster import local_cpus, ray_session
from raptide.data.fasta import SOUND, FastaBatch, ReadingRules, read_fasta
from raptide.data.fasta_text import is_stream, refuse_missing
from raptide.errors import ConfigError, RaptideError, SequenceError, plain_errors
from raptide.methods import Long
from raptide.model.formats.detect import read_weights
from raptide.training.checkpoints.checkpoint import find_bundle

BATCH_SEQUENCES = 256

WAITING_BATCHES = 8
"""Batches of a pipe that are read ahead of the task that takes them."""

STOP_S = 1.0
"""How often the reader of a pipe looks whether it is still wanted."""


class Embedder:
    """One engine in a Ray Data worker."""

    def __init__(self, bundle: str, long: Long) -> None:
        from raptide import Engine

        self._engine = Engine.load(bundle)
        self._long = long

    # A generator: only out of those does Ray Data let our own errors through.
    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        limit = self._engine.max_residues
        for name, length in zip(*(table[c].to_pylist() for c in ("id", "length")), strict=True):
            if length > limit and self._long == "error":
                raise SequenceError(
                    f"Record {name!r} has {length} residues, but this model takes at most {limit}; "
                    "leave it out, or ask for overlapping windows with --long window."
                )
        vectors = np.asarray(self._engine.embed(table["sequence"].to_pylist(), long=self._long))
        flat = pa.array(vectors.ravel(), pa.float32())
        embeddings = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
        yield table.select(["id", "length"]).append_column("embedding", embeddings)


def main() -> None:
    parser = job_parser(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="bundle, checkpoint or run")
    parser.add_argument("--input", type=Path, nargs="+", required=True, metavar="FASTA")
    parser.add_argument("--output", type=Path, required=True, metavar="PARQUET")
    parser.add_argument("--workers", type=int, default=1, help="engines (default: %(default)s)")
    parser.add_argument("--long", choices=("error", "window"), default="error")
    add_reading_options(parser)
    args = parser.parse_args()
    if args.output.exists():
        raise ConfigError(f"{args.output} exists already; remove it or choose another --output.")
    refuse_output(args.output, "--output")
    refuse_inputs(args.input)
    if args.workers < 1:
        raise ConfigError(f"--workers needs at least 1, but {args.workers} was given.")
    bundle = find_bundle(args.model)
    read_weights(bundle)  # what is wrong with them is said here, and not by every worker
    with ray_session(num_cpus=args.workers + local_cpus(), verbose=args.verbose):
        rules = reading_rules(args)
        embedded, dropped = embed(bundle, args.input, args.output, args.workers, args.long, rules)
    if dropped:
        print(f"Left out {dropped:,} records that are no proteins")
    print(f"Embedded {embedded:,} proteins with {bundle}\n  {args.output}")


def refuse_inputs(inputs: list[Path]) -> None:
    for file, times in Counter(inputs).items():
        if not is_stream(file):
            refuse_missing(file)
        elif times > 1:
            raise ConfigError(f"--input names {file} {times} times, but it can be read only once.")


def embed(
    bundle: Path, inputs: list[Path], output: Path, workers: int, long: Long, rules: ReadingRules
) -> tuple[int, int]:
    """Write one row a protein; the file appears under its name only when it is complete.

    Returns how many were written, and how many records were left out by the rules.
    """
    dropped: Any = ray.remote(num_cpus=0)(Tally).remote()

    def parse(files: dict[str, np.ndarray]) -> Iterator[pa.Table]:
        for path in files["path"]:
            if path in queues:
                yield from _receive(queues[path], path)
            else:
                yield from _read(path, rules, dropped)

    gpus = 1 if ray.cluster_resources().get("GPU", 0) >= workers else 0
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    streams = [str(path) for path in inputs if is_stream(path)]
    files = [{"path": str(path if is_stream(path) else path.resolve())} for path in inputs]
    queues = {path: Queue(WAITING_BATCHES, {"num_cpus": 0}) for path in streams}
    dataset = (
        ray.data.from_items(files, override_num_blocks=len(files))
        .map_batches(parse, batch_size=1)
        .map_batches(
            Embedder,
            fn_constructor_args=(str(bundle), long),
            batch_format="pyarrow",
            batch_size=BATCH_SEQUENCES,
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_gpus=gpus,
        )
    )
    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(output.name + ".partial")
    try:
        with plain_errors(), _feeding(queues, rules, dropped):
            written = _write(dataset.iter_batches(batch_size=None, batch_format="pyarrow"), partial)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    partial.rename(output)
    return written, ray.get(dropped.total.remote())


def _read(path: str, rules: ReadingRules, dropped: Any) -> Iterator[pa.Table]:
    for batch in read_fasta(path, BATCH_SEQUENCES, rules):
        if flawed := int((batch.flaws != SOUND).sum()):
            ray.get(dropped.add.remote(flawed))
        yield _to_table(batch)


@contextmanager
def _feeding(queues: dict[str, Queue], rules: ReadingRules, dropped: Any) -> Iterator[None]:
    """Within the block, pipes are read here, where they end, for tasks that may run anywhere."""
    stop = threading.Event()

    def items(path: str) -> Iterator[Any]:
        try:
            yield from _read(path, rules, dropped)
            yield None
        except RaptideError as error:
            yield error

    def feed() -> None:
        for path, queue in queues.items():
            for numbered in enumerate(items(path)):
                while not (stop.is_set() or _put(queue, numbered)):
                    pass
                if stop.is_set():
                    return

    thread = threading.Thread(target=feed, daemon=True)  # it may wait for a pipe without end
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(2 * STOP_S)


def _put(queue: Queue, item: Any) -> bool:
    try:
        queue.put(item, timeout=STOP_S)
    except Full:
        return False
    return True


def _receive(queue: Queue, path: str) -> Iterator[pa.Table]:
    """What is read of a pipe. A task that Ray starts anew would miss what the first has taken."""
    for expected in count():
        number, item = queue.get()
        if number != expected:
            raise RaptideError(
                f"The task that took the records of {path} died, and they cannot be read again; "
                "start the job anew, or write them to a file first."
            )
        if isinstance(item, RaptideError):
            raise item
        if item is None:
            return
        yield item


class Tally:
    """Counts what tasks leave out."""

    def __init__(self) -> None:
        self._total = 0

    def add(self, count: int) -> None:
        self._total += count

    def total(self) -> int:
        return self._total


def _to_table(batch: FastaBatch) -> pa.Table:
    """The records that are to be embedded."""
    ends = np.cumsum(batch.lengths)
    residues = np.frombuffer(batch.residues, np.uint8)
    kept = np.flatnonzero(batch.flaws == SOUND).tolist()
    sequences = [decode_residues(residues[ends[i] - batch.lengths[i] : ends[i]]) for i in kept]
    names = [batch.names[index] for index in kept]
    return pa.table({"id": names, "length": batch.lengths[kept], "sequence": sequences})


def _write(tables: Iterator[pa.Table], file: Path) -> int:
    writer: Any = None
    written = 0
    with tqdm(unit=" proteins") as bar:
        for table in tables:
            writer = writer or pq.ParquetWriter(file, table.schema, compression="zstd")
            writer.write_table(table)
            written += table.num_rows
            bar.update(table.num_rows)
    writer.close()
    return written


if __name__ == "__main__":
    run_job(main)
