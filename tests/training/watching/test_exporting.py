"""What Prometheus gets of a run."""

import json
import re
import shutil
import subprocess
import time

import pytest
import yaml
from conftest import ROOT

from raptide.training.watching import exporting
from raptide.training.watching.exporting import CHECKPOINT, GAUGES, UPDATED, RunExporter

MONITORING = ROOT / "deploy/monitoring"
ALERTS = MONITORING / "training_alerts.yaml"
DASHBOARD = MONITORING / "training_dashboard.json"


class Recorder:
    """A gauge that remembers what it was set to."""

    values: dict[str, list[float]]

    def __init__(self, name, description, tag_keys):
        self.name = name
        assert (tag_keys, bool(description)) == (("run",), True)

    def set(self, value, tags):
        assert tags == {"run": "mine"}
        self.values.setdefault(self.name, []).append(value)


@pytest.fixture
def values(monkeypatch):
    monkeypatch.setattr(exporting, "Gauge", Recorder)
    monkeypatch.setattr(Recorder, "values", {}, raising=False)
    return Recorder.values


def test_values_stay_in_sight_until_the_run_ends(values, monkeypatch):
    monkeypatch.setattr(exporting, "REFRESH_S", 0.01)
    exporter = RunExporter("mine")
    exporter.export({"train/loss": 2.5, "train/lr": 0.1})
    until = time.monotonic() + 10
    while len(values["raptide_train_loss"]) < 3:
        assert time.monotonic() < until
        time.sleep(0.01)
    exporter.close()
    assert set(values["raptide_train_loss"]) == {2.5}
    assert sorted(values) == sorted(["raptide_train_loss", UPDATED[0], CHECKPOINT[0]])


def test_a_checkpoints_age_counts_from_its_beginning(values, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(exporting.time, "time", lambda: now[0])
    exporter = RunExporter("mine")
    now[0] = 1100.0
    exporter.export({"train/loss": 2.5})
    assert (values[CHECKPOINT[0]][-1], values[UPDATED[0]][-1]) == (1000.0, 1100.0)
    now[0] = 1200.0
    exporter.export({"train/loss": 2.4, "speed/checkpoint_s": 30.0})
    exporter.close()
    assert (values[CHECKPOINT[0]][-1], values[UPDATED[0]][-1]) == (1170.0, 1200.0)


def test_a_run_exports_its_metrics(watched):
    result, series = watched
    exported = {re.match(r"ray_(\w+)", name)[1] for name in series}
    needs_a_peak_that_is_known = {"raptide_train_mfu_ratio"}
    names = {name for name, _ in [*GAUGES.values(), UPDATED, CHECKPOINT]}
    assert exported == names - needs_a_peak_that_is_known
    assert all(f'run="{result.folder.name}"' in name for name in series)
    last = {re.match(r"ray_(\w+)", name)[1]: value for name, value in series.items()}
    assert last["raptide_train_step"] == result.step
    assert last["raptide_train_tokens"] == result.tokens
    assert last["raptide_train_heldout_ece"] == pytest.approx(result.heldout_ece.all_chosen)
    assert (last["raptide_train_workers"], last["raptide_train_restarts"]) == (2, 0)
    assert 0 < time.time() - last[CHECKPOINT[0]] < time.time() - result.folder.stat().st_ctime + 60


def expressions():
    """PromQL of every alert and every panel."""
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    panels = json.loads(DASHBOARD.read_text())["panels"]
    yield from (rule["expr"] for group in groups for rule in group["rules"])
    yield from (target["expr"] for panel in panels for target in panel["targets"])


def test_alerts_and_dashboard_ask_for_names_and_labels_that_a_run_exports(watched):
    _, series = watched
    exported = {name.partition("{")[0] for name in series}
    labels = set.intersection(*(set(re.findall(r'[{,](\w+)="', name)) for name in series))
    needs_a_peak_that_is_known = {"ray_raptide_train_mfu_ratio"}
    asked, by = set(), set()
    for expression in expressions():
        found = set(re.findall(r"ray_\w+", expression))
        assert found, expression
        asked |= found
        for names in re.findall(r"by \(([^)]*)\)|\{([^}]*)\}", expression):
            by |= set(re.findall(r"^\w+", "".join(names)))
    assert asked <= exported | needs_a_peak_that_is_known
    assert {name for name in exported if "raptide_train" in name} <= asked  # nothing is in vain
    assert by == {"run"} <= labels


def test_the_dashboard_of_training_is_one():
    dashboard = json.loads(DASHBOARD.read_text())
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"]) == 12
    (run,) = [each for each in dashboard["templating"]["list"] if each["name"] == "run"]
    metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", run["query"]).groups()
    assert (metric, label) == (f"ray_{UPDATED[0]}", "run")


def test_prometheus_takes_the_alerts_and_they_say_what_they_should():
    if shutil.which("promtool") is None:
        pytest.skip("promtool (Debian's package prometheus) is not installed")
    for command in (
        ["check", "config", "prometheus.yaml"],
        ["check", "rules", ALERTS.name],
        ["test", "rules", "training_alerts_test.yaml"],
    ):
        done = subprocess.run(
            ["promtool", *command], cwd=MONITORING, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_of_training_is_tested_both_ways():
    """Once where it must be silent, once where it must not."""
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    alerts = {rule["alert"] for group in groups for rule in group["rules"]}
    tests = yaml.safe_load((MONITORING / "training_alerts_test.yaml").read_text())["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    assert {case["alertname"] for case in cases if case.get("exp_alerts")} == alerts
    assert {case["alertname"] for case in cases if not case.get("exp_alerts")} == alerts
