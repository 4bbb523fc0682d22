"""What this machine's Ray exports to Prometheus."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import ray

LOOK_EVERY_S = 1.0


def scrape() -> str:
    """Metrics as the node's Prometheus port shows them."""
    port = ray.nodes()[0]["MetricsExportPort"]
    return httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=30).text


@contextmanager
def series_seen(prefix: str) -> Iterator[dict[str, float]]:
    """All series with a prefix that are exported until the block ends, each with its last value.

    A look at the end would come too late: what a process exports goes away with it.
    """
    seen: dict[str, float] = {}
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(LOOK_EVERY_S):
            for line in scrape().splitlines():
                if line.startswith(prefix):
                    series, value = line.rsplit(" ", 1)
                    seen[series] = float(value)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()
