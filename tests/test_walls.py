"""The walls between the rooms, and the pages that draw them."""

import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

BREACHES = {
    "platform/raptide/data/streaming/rows.py": "raptide.data.building.records",
    "platform/raptide/data/building/shards.py": "raptide.data.streaming.rows",
    "platform/raptide/model/transformer.py": "raptide.model.formats.names",
    "platform/raptide/model/formats/bundle.py": "raptide.model.formats.fair_esm",
    "platform/raptide/training/planning/recipe.py": "raptide.training.step",
    "platform/raptide/training/checkpoints/saving.py": "raptide.training.watching.metrics",
    "platform/raptide/calls/scoring.py": "torch",
    "platform/raptide/client/exchange.py": "raptide.client.transport",
    "platform/raptide/inference/forward.py": "ray",
    "serve/replica/batcher.py": "serve.gateway.refusals",
    "serve/gateway/routing.py": "serve.replica.batcher",
    "serve/metrics.py": "serve.replica.batcher",
    "jobs/processes.py": "serve.settings",
}
"""Imports through a wall, by the file that would have them."""


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """What the linter says of a copy in which every wall is broken."""
    copy = tmp_path_factory.mktemp("broken")
    for folder in ("platform", "serve", "jobs"):
        junk = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / folder, copy / folder, ignore=junk)
    shutil.copy(ROOT / "pyproject.toml", copy)
    for file, module in BREACHES.items():
        with (copy / file).open("a") as stream:
            stream.write(f"\nimport {module}\n")
    result = subprocess.run(
        [f"{sys.prefix}/bin/lint-imports", "--no-cache"],
        cwd=copy,
        env={"PYTHONPATH": f"{copy}/platform:{copy}", "PATH": "", "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    return result.stdout


@pytest.mark.parametrize(("file", "module"), BREACHES.items())
def test_an_import_through_a_wall_is_caught(broken, file, module):
    importer = file.removeprefix("platform/").removesuffix(".py").replace("/", ".")
    assert re.search(rf"{re.escape(importer)} -> {re.escape(module)} ", broken), broken


def _source_folders():
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    files = [ROOT / line for line in tracked if (ROOT / line).is_file()]
    return files, {file.parent.relative_to(ROOT) for file in files}


def test_every_folder_and_file_has_its_line_on_the_architecture_page():
    tree = (ROOT / "docs/architecture.md").read_text().split("## File by file")[1]
    tree = tree.split("```")[1]
    named, path = set(), []
    for line in tree.strip().splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        words = re.match(r"\s*((?:\S+ (?=\S+/(?: |$)))*\S+)", line)[1].split()
        path = path[:depth]
        named |= {"/".join([*path, word.rstrip("/")]) for word in words}
        path.append(words[0].rstrip("/"))
    files, folders = _source_folders()
    source = ("platform", "serve", "jobs")
    expected = {str(f) for f in folders if f.parts and not str(f).startswith((".", "tests/"))}
    expected |= {
        str(file.relative_to(ROOT))
        for file in files
        if file.suffix == ".py"
        and file.relative_to(ROOT).parts[0] in source
        and file.parent.name != "rpc"
        and (file.name != "__init__.py" or file.parent.name == "raptide")
    }
    expected |= {str(f.relative_to(ROOT)) for f in (ROOT / "tests").iterdir() if f.is_dir()} & {
        str(f) for f in folders
    }
    # The tree's first line, platform/raptide, stands for both.
    assert not {e for e in expected if e not in named and e != "platform"}
    gone = {n for n in named if not (ROOT / n).exists()}
    assert not gone


def test_every_folder_of_the_library_is_drawn():
    floors = (ROOT / "docs/architecture.md").read_text().split("```mermaid")[1].split("```")[0]
    _, folders = _source_folders()
    rooms = {f.name for f in folders if f.parts[:2] == ("platform", "raptide") and len(f.parts) > 2}
    rooms |= {f.name for f in folders if f.parts[:1] in (("serve",), ("jobs",))}
    drawn = set(re.findall(r"\w+", floors))
    assert not rooms - drawn - {"recipes", "base", "beyond", "benchmarks", "tiny", "variants"}


def test_every_folder_of_the_library_stands_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    tree = readme.split("## The tree")[1].split("```")[1]
    _, folders = _source_folders()
    for folder in folders:
        if folder.parts and folder.parts[0] in ("platform", "serve", "jobs", "tests", "docs"):
            room = "tests" if folder.parts[0] == "tests" else folder.name
            assert re.search(rf"\b{room}/", tree), f"{folder} has no line in README's tree"
