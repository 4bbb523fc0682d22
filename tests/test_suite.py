"""The suite about itself: which tests a change asks for, what a failure shows, what has grown."""

import os
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from process_logs import written_since
from suite_times import grown

sys.path.append(str(ROOT / ".ci"))
from changed_tests import changed_since, folders_of


@pytest.mark.parametrize(
    ("changed", "folders"),
    [
        (["platform/raptide/training/worker.py", "docs/a.md"], ["tests/training"]),
        (["serve/app.py", "jobs/x.py", "serve/y.py"], ["tests/jobs", "tests/serve"]),
        (["tests/data/test_fasta.py", "README.md"], ["tests/data"]),
        (["platform/raptide/alphabet.py"], ["tests"]),
        (["pyproject.toml"], ["tests"]),
        (["tests/conftest.py"], ["tests"]),
        (["tests/support/draws.py"], ["tests"]),
        (["docs/a.md"], []),
        (["deploy/kubernetes/base/rayjob.yaml"], ["tests/deploy"]),
    ],
)
def test_a_change_asks_for_the_tests_of_its_folder_or_for_all(changed, folders):
    assert folders_of(changed) == folders


def test_what_changed_since_a_commit_nobody_knows_is_unknown():
    assert changed_since("") is None
    assert changed_since("0" * 40) is None
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    if head.returncode == 0:  # an unpacked archive has no history
        assert changed_since(head.stdout.strip()) == []


def test_a_folder_that_grew_is_named_on_a_machine_of_any_speed():
    record = {"data": 100.0, "model": 30.0, "serve": 200.0, "client": 2.0}
    slower = {name: 2 * seconds for name, seconds in record.items()}
    assert grown(slower, record) == {}
    assert grown(slower | {"serve": 450.0, "client": 40.0}, record) == {"serve": 400.0}
    assert grown({"new": 50.0}, record) == {}


def test_a_failure_shows_what_was_written_meanwhile_and_trouble_first(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    logs = tmp_path / "ray/session_2026-01-01/logs"
    (logs / "serve").mkdir(parents=True)
    (logs / "worker-old.err").write_text("ValueError: of another test\n")
    os.utime(logs / "worker-old.err", (1, 1))
    (logs / "worker-quiet.out").write_text("a line\n" * 100)
    (logs / "worker-empty.err").write_text("")
    (logs / "serve/replica.log").write_text("Traceback (most recent call last):\nKeyError: 'x'\n")
    shown = list(written_since(time.time() - 60))
    assert [name for name, _ in shown] == [
        "logs/replica.log",
        "session_2026-01-01/worker-quiet.out",
    ]
    assert "KeyError" in shown[0][1]
    assert len(shown[1][1].splitlines()) == 40
