"""tests/chaos in small form: a process with a cluster of its own, whose nodes come and go, and
folders in which opening, reading and writing fail at random."""

import json
import subprocess
import sys

from conftest import ROOT


def test_a_run_among_dying_and_new_nodes_is_the_quiet_run(tmp_path):
    script = ROOT / "tests/chaos/pretrain_chaos.py"
    options = [
        "--events",
        "4",
        "--steps",
        "140",
        "--seed",
        "124",
        "--json",
        tmp_path / "chaos.json",
    ]
    done = subprocess.run(
        [sys.executable, script, *map(str, options)],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "chaos.json").read_text())
    assert report["audit_equal"]
    assert report["loss_max_abs_diff"] < 1e-4
    assert report["events"] == {
        "node added": 1,
        "storage gone": 1,
        "node preempted": 1,
        "node killed": 1,
    }
    assert report["resizes"] >= 2
    assert report["faults"] >= 30
    assert {"open", "read", "write", "outage", "W&B out of reach"} <= report[
        "faults_by_kind"
    ].keys()
    # What could not be saved while the storage was gone costs an interval more.
    assert report["longest_redone"] <= 4 * report["checkpoint_every_steps"]
