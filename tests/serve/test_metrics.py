"""What Prometheus and Grafana get and ask for, against what an endpoint exports."""

import json
import re
import shutil
import subprocess
import time

import pytest
import yaml
from conftest import ROOT
from exported import scrape

from serve.gateway import refusals

DASHBOARD = ROOT / "serve/dashboard.json"
ALERTS = ROOT / "serve/alerts.yaml"

UNCOMMON = {"ray_raptide_retries_total": {"reason"}}
"""Exported once a replica has died, with these labels."""

promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool (Debian: prometheus) is not installed"
)


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
    expected = {f"ray_{name}" for name in written - {"raptide_retries_total"}}  # needs a failure
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


def series():
    """Every series that is exported now: its name with its labels, to its value."""
    found = {}
    for name, labels, value in re.findall(
        r"^(ray_raptide_\w+)\{(.*)\} (\S+)$", scrape(), re.MULTILINE
    ):
        found[name, labels] = float(value)
    return found


def labels_exported():
    """The labels of each metric."""
    found = {name: set(labels) for name, labels in UNCOMMON.items()}
    for name, labels in series():
        found.setdefault(name, set()).update(re.findall(r'(\w+)="', labels))
    return found


def queries():
    """Everything that the dashboard and the alerts ask Prometheus."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    rules = yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"]
    asked = [target["expr"] for panel in panels for target in panel["targets"]]
    return [*asked, *(rule["expr"] for rule in rules)]


def test_what_dashboard_and_alerts_ask_for_is_exported(client):
    kinds = set(re.findall(r"^([a-z_]+) +\d", refusals.__doc__, re.MULTILINE))
    asked = [(query, *each) for query in queries() for each in metrics_of(query)]
    until = time.monotonic() + 40
    known = labels_exported()
    while missing := {name for _, name, _ in asked} - known.keys():
        assert time.monotonic() < until, missing
        client.post("/v1/embeddings", json={"input": ["MKTAYIAKQR", "M1"]})
        client.post("/v1/embeddings", json={"input": ["MKTAYIAKQR"]})
        time.sleep(1)
        known = {**known, **labels_exported()}
    for query, name, matchers in asked:
        grouped = re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", query)))
        assert {*matchers, *grouped} <= known[name], query
        assert set(matchers.get("type", "internal").split("|")) <= kinds, query


def metrics_of(query):
    """Each metric of a query with the labels it is matched by, and their values."""
    for name, matchers in re.findall(r"(ray_\w+)(?:\{([^}]*)\})?", query):
        yield name, dict(re.findall(r'(\w+)=~?"([^"]*)"', matchers))


def test_every_counter_grows_with_what_is_asked(client):
    """One that stays is no measurement."""

    def ask():
        client.post("/v1/embeddings", json={"input": ["MKTAYIAKQR"] * 3})
        client.post("/v1/embeddings", json={"input": "M1"})

    def totals():
        """By name: labels tell processes apart, which earlier tests may have ended."""
        found = {}
        for (name, _), value in series().items():
            if name.endswith(("_total", "_count")):
                found[name] = found.get(name, 0) + value
        return found

    ask()
    before = totals()
    until = time.monotonic() + 40
    while still := {n for n, v in totals().items() if v <= before.get(n, 0) + 0.5} - {*UNCOMMON}:
        assert time.monotonic() < until, still
        ask()
        time.sleep(1)


def test_a_replica_that_nobody_asks_is_seen(client):
    client.post("/v1/embeddings", json={"input": ["MKTAYIAKQR"]})
    _settle()
    until = time.monotonic() + 20
    while not any(name == "ray_raptide_replica_up" for name, _ in series()):
        assert time.monotonic() < until
        time.sleep(0.5)


def _settle():
    """Until what the last request set has been exported, and no more."""
    quiet = 0
    until = time.monotonic() + 20
    while quiet < 3 and time.monotonic() < until:
        seen = any(name == "ray_raptide_replica_up" for name, _ in series())
        quiet = 0 if seen else quiet + 1
        time.sleep(0.5)


@promtool
def test_the_alerts_fire_when_they_should_and_not_otherwise():
    done = subprocess.run(
        ["promtool", "test", "rules", ROOT / "tests/serve/alerts_test.yaml"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@promtool
def test_prometheus_understands_every_query(tmp_path):
    rules = [
        {"record": f"panel:{number}", "expr": query.replace("$model", ".*")}
        for number, query in enumerate(queries())
    ]
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    done = subprocess.run(["promtool", "check", "rules", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dashboard_is_one():
    dashboard = json.loads(DASHBOARD.read_text())
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"]) == 12
    assert all(target["expr"] for panel in dashboard["panels"] for target in panel["targets"])
