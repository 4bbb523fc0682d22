"""What Prometheus and Grafana get, against what the code exports."""

import json
import re
import time

from conftest import ROOT
from exported import scrape

DASHBOARD = ROOT / "serve/dashboard.json"


def _unseen(patterns):
    text = scrape()
    return {pattern for pattern in patterns if not re.search(pattern, text)}


def test_every_number_of_a_request_is_exported_and_drawn(client):
    client.post("/v1/embeddings", json={"input": ["MKTAYIAKQR"] * 3})
    client.post("/v1/embeddings", json={"input": "M1"})
    drawn = set(
        re.findall(r"ray_(raptide_[a-z_]+?)(?:_bucket|_sum|_count)?[{\[)]", DASHBOARD.read_text())
    )
    written = set(re.findall(r'"(raptide_[a-z_]+)"', (ROOT / "serve/metrics.py").read_text()))
    assert drawn <= written
    needs_a_cache_or_a_failure = {
        "raptide_cache_total",
        "raptide_cache_bytes",
        "raptide_retries_total",
    }
    expected = {f"ray_{name}" for name in written - needs_a_cache_or_a_failure}
    expected |= {
        r'ray_raptide_errors_total\{[^}]*type="invalid_request"',
        r'ray_raptide_requests_total\{[^}]*call="embeddings"[^}]*status="200"',
        r'ray_raptide_requests_total\{[^}]*call="embeddings"[^}]*status="422"',
    }
    # Ray shows a gauge once for each time that it was set, so no one look sees everything.
    until = time.monotonic() + 40
    while expected := _unseen(expected):
        assert time.monotonic() < until, expected
        client.post("/v1/embeddings", json={"input": ["MKTAYIAKQR"]})
        time.sleep(1)


def test_the_dashboard_is_one():
    dashboard = json.loads(DASHBOARD.read_text())
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"]) == 12
    assert all(target["expr"] for panel in dashboard["panels"] for target in panel["targets"])
