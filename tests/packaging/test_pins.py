"""constraints.txt and the script that makes it."""

import json
import re
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.append(str(ROOT / ".ci"))
import pin_versions


def plain(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def test_everything_that_is_asked_for_is_pinned_once():
    lines = [line for line in pin_versions.FILE.read_text().splitlines() if line[0] != "#"]
    assert all(re.fullmatch(r"[\w.-]+==[\w.+!]+", line) for line in lines)
    names = [plain(line.split("==")[0]) for line in lines]
    assert len(set(names)) == len(names)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *(each for extra in extras.values() for each in extra)]
    wanted = {plain(re.match(r"[\w.-]+", each)[0]) for each in asked}
    assert wanted - set(names) <= {"raptide"}


def test_the_extras_come_together_in_all():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    (everything,) = extras["all"]
    assert set(re.findall(r"\w+", everything)[1:]) == extras.keys() - {
        *("all", "dev", "bench", "engine", "cloud")
    }


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ({"a": "1"}, {"a": "1"}, ""),
        (
            {"a": "1", "b": "1"},
            {"a": "2", "c-c": "3"},
            "  a: 1 -> 2\n  b: 1 -> none\n  c-c: none -> 3",
        ),
    ],
)
def test_differences_are_told(before, after, told):
    assert pin_versions.difference(before, after) == told


def test_making_constraints_keeps_what_stands_there_on_request(tmp_path, monkeypatch, capsys):
    """pip reports names as their packages spell them, which is not as a file does."""
    file = tmp_path / "constraints.txt"
    file.write_text("# old\nalpha_a==1.0\ngone==2.0\n")
    monkeypatch.setattr(pin_versions, "FILE", file)
    found = {"Alpha-a": "1.5", "Beta_x": "3.0", "triton": "9"}

    def pip(command, check):
        metadata = [{"metadata": {"name": n, "version": v}} for n, v in found.items()]
        report = Path(command[command.index("--report") + 1])
        report.write_text(json.dumps({"install": metadata}))

    monkeypatch.setattr(pin_versions.subprocess, "run", pip)
    monkeypatch.setattr(sys, "argv", ["pin_versions.py", "--keep"])
    assert pin_versions.main() == 0
    lines = file.read_text().splitlines()
    assert "pin_versions.py" in lines[1]
    assert lines[2:] == ["alpha-a==1.0", "beta-x==3.0", "gone==2.0"]
    told = capsys.readouterr().out.splitlines()
    assert told[1:] == ["  beta-x: none -> 3.0"]
    monkeypatch.setattr(sys, "argv", ["pin_versions.py"])
    assert pin_versions.main() == 0
    assert pin_versions.read(file) == {"alpha-a": "1.5", "beta-x": "3.0"}


def test_what_follows_torch_or_pip_is_left_out():
    names = ("nvidia-cublas", "cuda-bindings", "triton", "pip", "setuptools", "raptide")
    assert all(pin_versions.LEFT_OUT.fullmatch(name) for name in names)
    assert not pin_versions.LEFT_OUT.fullmatch("pipdeptree")


def test_the_newest_of_everything_is_reported(tmp_path, monkeypatch):
    outcomes = {"install": (0, "", 3.0), "tests": (1, "E  a test failed", 5.0)}
    told = pin_versions.describe(outcomes, {"numpy": "99.0"})
    assert "| tests | FAILED | 5 |" in told
    assert "## tests\n\n```\nE  a test failed\n```" in told
    assert "-> 99.0" in told
