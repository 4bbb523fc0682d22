"""Jobs in processes of their own that are killed and given again."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from bulk_works import ManyUnits
from conftest import ROOT
from draws import generator, random_sequence

from raptide.bulk import BulkSettings, OutputFolder, find_sources, run_bulk


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted((folder / "parts").glob("*"))}


def run(work, file, folder, workers):
    settings = BulkSettings(workers=workers, memory_gb=0.6)
    return run_bulk(work, find_sources([file]), OutputFolder.at(folder), settings)


def assert_nothing_runs(folder):
    deadline = time.monotonic() + 20
    while True:
        commands = [each.info["cmdline"] or [] for each in psutil.process_iter(["cmdline"])]
        if not any(str(folder) in " ".join(command) for command in commands):
            return
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGKILL, -signal.SIGKILL),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.thorough),
    ],
)
def test_a_killed_job_given_again_ends_with_the_bytes_of_one_that_was_not(
    cluster, tmp_path, number, code
):
    records = [random_sequence(int(generator().integers(1, 30))) for _ in range(160)]
    records[7:9] = ["M1", ""]
    file = tmp_path / "a.fasta"
    file.write_text("".join(f">p{n}\n{each}\n" for n, each in enumerate(records)))
    run(ManyUnits(str(tmp_path / "log0")), file, tmp_path / "whole", workers=1)
    command = [sys.executable, str(ROOT / "tests/support/bulk_driver.py")]
    path = os.pathsep.join([str(ROOT / "jobs"), os.environ["PYTHONPATH"]])
    driver = subprocess.Popen(
        [*command, str(file), str(tmp_path / "out"), str(tmp_path / "log")],
        env=os.environ | {"PYTHONPATH": path},
        stderr=subprocess.PIPE,
        text=True,
    )
    while len(contents(tmp_path / "out")) < 4:
        assert driver.poll() is None, driver.stderr.read()
        time.sleep(0.05)
    driver.send_signal(number)
    assert driver.wait(60) == code
    if code == 130:
        assert driver.stderr.read().strip().splitlines()[-1] == "interrupted"
    assert_nothing_runs(tmp_path / "out")
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["finished"] is False
    done, whole = contents(tmp_path / "out"), contents(tmp_path / "whole")
    assert done.items() < whole.items(), "what has its name is whole"

    again = ManyUnits(str(tmp_path / "log2"))
    outcome = run(again, file, tmp_path / "out", workers=2)
    assert (outcome.rows, outcome.rejects, outcome.parts) == (158, 2, 20)
    assert len(again.computed()) <= 160 - 8 * len(done) + 2
    assert contents(tmp_path / "out") == whole
    for name in ("rejects.parquet",):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {".lock", "manifest.json", "parts", "rejects.parquet"}
