"""tests/chaos in small form: a process with a cluster of its own, whose nodes come and go."""

import json
import subprocess
import sys

from conftest import ROOT


def test_a_run_among_dying_and_new_nodes_is_the_quiet_run(tmp_path):
    script = ROOT / "tests/chaos/pretrain_chaos.py"
    options = [
        "--events",
        "3",
        "--steps",
        "140",
        "--seed",
        "20",
        "--stumbles",
        "0",
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
    assert sum(report["events"].values()) == 3
    assert report["kills"] == 2  # one node without notice, one with
    assert report["resizes"] >= 2
    assert report["longest_redone"] <= 2 * report["checkpoint_every_steps"]
