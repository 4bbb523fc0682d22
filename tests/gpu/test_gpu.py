"""The run of a GPU, here with tiny shapes: that its first failure there is no typo."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

SCRIPT = ROOT / "tests/gpu/gpu_run.py"
PARTS = ("parity", "steps", "peers", "passes")


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """The folder of a dry run, and what it said."""
    folder = tmp_path_factory.mktemp("dry")
    done = subprocess.run(
        [sys.executable, SCRIPT, "--device", "cpu", "--json", "found.json"],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, json.loads((folder / "found.json").read_text())


def test_every_part_comes_to_its_end_and_nothing_is_wrong(dry):
    _, report = dry
    assert tuple(dict.fromkeys(row["part"] for row in report["rows"])) == PARTS
    assert "WRONG" not in {row["verdict"] for row in report["rows"]}
    parity = [row for row in report["rows"] if row["part"] == "parity"]
    assert {row["verdict"] for row in parity} == {"ok"}
    families = {row["case"].split()[0] for row in parity}
    assert families == {"esm1", "esm1b", "esm2"}
    assert {row["value"] for row in report["rows"] if row["what"] == "compiled again"} == {0}


def test_the_report_is_a_table_for_people_too(dry):
    folder, report = dry
    lines = (folder / "found.md").read_text().splitlines()
    assert sum(line.startswith("| parity |") for line in lines) == sum(
        row["part"] == "parity" for row in report["rows"]
    )
    assert sorted(path.name for path in folder.iterdir()) == ["found.json", "found.md"]


@pytest.mark.parametrize("module", ["parity", "steps", "passes"])
def test_parts_need_no_ray_no_arrow_no_deepspeed(module, tmp_path):
    heavy = ("ray", "pyarrow", "deepspeed", "transformers")
    paths = [str(ROOT / each) for each in ("tests/gpu", "platform", "tests/support")]
    script = f"import sys; sys.path[:0] = {paths!r}\n"
    script += f"sys.modules.update(dict.fromkeys({heavy!r}))\nimport {module}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_why_it_does_nothing(tmp_path):
    done = subprocess.run([sys.executable, SCRIPT], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0
    assert "Skipped: torch finds no GPU" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.thorough
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here")
def test_on_a_gpu_nothing_is_wrong(tmp_path):
    done = subprocess.run([sys.executable, SCRIPT], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
