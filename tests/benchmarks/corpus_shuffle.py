"""The build's shuffle alone, and what it makes of the process that drives it.

    python corpus_shuffle.py BUCKETS MEGABYTES

Prints as JSON the seconds, and by how many megabytes the driver's own memory (what no other process
shares) has grown at most. Rows are of protein length, in blocks of four megabytes and a batch of
eight a task, so that there are as many tasks as for sixteen times the bytes.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator

import numpy as np
import psutil
import pyarrow as pa
import ray
import ray.data

from raptide.cluster import ray_session
from raptide.data.building import shuffle as shuffle_module
from raptide.data.building.shuffle import range_bucket, shuffle

ROW_BYTES, BLOCK_BYTES, BATCH_BYTES = 400, 4 << 20, 8 << 20
MEMORY_EVERY_S = 0.05


def main() -> None:
    buckets, megabytes = map(int, sys.argv[1:])
    shuffle_module.INPUT_BATCH_BYTES = BATCH_BYTES
    with ray_session(num_cpus=2):
        measure(2, 40)  # what is imported and started once
        print(json.dumps(measure(buckets, megabytes)))


def measure(buckets: int, megabytes: int) -> dict[str, float]:
    blocks = (megabytes << 20) // BLOCK_BYTES
    numbers = ray.data.from_items(list(range(blocks)), override_num_blocks=blocks)

    def place(table: pa.Table) -> np.ndarray:
        return range_bucket(table["hash"], buckets)

    def count(bucket: int, table: pa.Table) -> pa.Table:
        return pa.table({"bucket": [bucket], "rows": [table.num_rows]})

    ended = threading.Event()
    largest = [own_bytes()]
    before, started = largest[0], time.perf_counter()

    def watch() -> None:
        while not ended.wait(MEMORY_EVERY_S):
            largest[0] = max(largest[0], own_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        made = shuffle(numbers.map_batches(make_rows, batch_size=1), buckets, place, count)
        rows = sum(ray.get(result)["rows"][0].as_py() for result in made)
    finally:
        ended.set()
        watcher.join()
    assert rows == blocks * (BLOCK_BYTES // ROW_BYTES)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "driver_growth_mb": (largest[0] - before) / 1e6}


def make_rows(item: dict[str, np.ndarray]) -> Iterator[pa.Table]:
    rng = np.random.default_rng(int(item["item"][0]))
    count = BLOCK_BYTES // ROW_BYTES
    letters = pa.py_buffer(rng.integers(0, 20, count * ROW_BYTES, np.uint8))
    ends = pa.py_buffer(np.arange(count + 1, dtype=np.int64) * ROW_BYTES)
    residues = pa.LargeBinaryArray.from_buffers(pa.large_binary(), count, [None, ends, letters])
    yield pa.table({"hash": rng.integers(0, 2**64 - 1, count, np.uint64), "residues": residues})


def own_bytes() -> int:
    memory = psutil.Process().memory_info()
    return memory.rss - memory.shared


if __name__ == "__main__":
    main()
