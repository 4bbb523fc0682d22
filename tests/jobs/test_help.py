"""The help of every job, and what is said to those who mistype."""

import os
import re
import subprocess
import sys
from unittest import mock

import pytest
from conftest import ROOT
from in_process import job_in_process

import commandline
from raptide.__main__ import JOBS, jobs

NAMES = sorted(path.name for path in jobs().values())


@pytest.fixture(scope="module")
def parser_of(tmp_path_factory):
    """The parser of a job, as it shows its help, and what it shows."""
    here = tmp_path_factory.mktemp("here")

    def read(name):
        shown = []
        show = commandline.JobParser.print_help
        with mock.patch.object(
            commandline.JobParser, "print_help", lambda p, file=None: (shown.append(p), show(p))
        ):
            done = job_in_process(name, "--help", cwd=here)
        assert done.returncode == 0, done.stderr
        return shown[0], done.stdout

    return read


@pytest.mark.parametrize("value", ["-1", "-1,6", "-2,-1", "6,-1"])
def test_a_list_that_begins_with_a_negative_number_is_a_value(value):
    parser = commandline.JobParser()
    parser.add_argument("--layers")
    assert parser.parse_args(["--layers", value, "-v"]) == parser.parse_args(
        [f"--layers={value}", "-v"]
    )
    with pytest.raises(SystemExit):
        parser.parse_args(["--layers", "-v"])


def test_every_job_is_found():
    assert JOBS == ROOT / "jobs"
    assert {"pretrain_model.py", "evaluate_model.py", "run_demo.py"} <= set(NAMES)
    assert not {"commandline.py", "processes.py"} & set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_help_begins_with_examples_and_has_options_in_groups(parser_of, name):
    parser, shown = parser_of(name)
    first, _, rest = shown.partition("\n\n")
    assert first.endswith((".", ":")), "one sentence says what the job is for"
    example = rest.partition("\n\n")[0]
    assert example.startswith("    "), "examples come next"
    assert f"    python jobs/{name}" in example
    assert shown.index("python jobs/") < shown.index("usage:")
    optional = parser._optionals._group_actions
    assert {each.dest for each in optional} <= {"help", "verbose"}, "others are in groups"
    for action in parser._actions:
        assert action.help, f"{action.dest} has no help"


@pytest.mark.parametrize("name", NAMES)
def test_help_tells_defaults_and_what_numbers_count(parser_of, name):
    parser, shown = parser_of(name)
    flat = " ".join(shown.split())
    for action in parser._actions:
        if action.type in (int, float):
            assert action.metavar, f"{action.dest}: N, S, GB, SHARE, ..."
            assert re.search("[a-z]", action.help)
        if action.option_strings and action.default not in (None, False, [], "==SUPPRESS=="):
            option = action.option_strings[-1]
            (told,) = re.findall(rf"{option} (?:(?! -[a-z-]).)*?default: ([^)]*)\)", flat)[:1]
            assert str(action.default).strip("(),") in told or told in str(action.default)


def test_a_mistyped_option_is_answered_with_the_nearest(tmp_path):
    done = job_in_process("build_corpus.py", "--ouput", "x", cwd=tmp_path)
    assert done.returncode == 2
    assert "there is no option --ouput; did you mean --output?" in done.stderr
    done = job_in_process("pretrain_model.py", "--gibberish=3", cwd=tmp_path)
    assert "there is no option --gibberish; --help lists what there is." in done.stderr


def test_values_and_abbreviations_are_no_mistyped_options(tmp_path):
    missing = tmp_path / "none.fasta"
    done = job_in_process(
        "build_corpus.py", "--inp", missing, "--out", tmp_path / "c", cwd=tmp_path
    )
    assert "no option" not in done.stderr
    assert "none.fasta" in done.stderr


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("training.stepz=3", "did you mean `steps`"),
        ("steps=3", "did you mean `training.steps`"),
        ("model.batch_rows=3", "did you mean `stream.batch_rows`"),
        ("optimiser.nothing_like_it=3", "did you mean|known here"),
    ],
)
def test_a_mistyped_field_is_answered_with_the_nearest_wherever_it_is(tmp_path, override, hint):
    recipe = ROOT / "jobs/recipes/demo.yaml"
    done = job_in_process("pretrain_model.py", "--config", recipe, override, cwd=tmp_path)
    assert done.returncode == 2
    assert re.search(hint, done.stderr), done.stderr


def test_recipes_and_benchmarks_that_come_along_are_called_by_name(tmp_path):
    found = commandline.shipped_file(commandline.Path("demo"), "recipes")
    assert found == ROOT / "jobs/recipes/demo.yaml"
    done = job_in_process("pretrain_model.py", "--config", "dmeo", cwd=tmp_path)
    assert "There is no file dmeo; did you mean demo?" in done.stderr


REFUSED = """
from commandline import run_job

def main():
    try:
        open("/proc/self/mem/x")
    except OSError as error:
        raise RuntimeError("a task failed") from error

run_job(main)
"""


def test_what_the_system_refuses_is_one_sentence():
    path = os.pathsep.join([str(ROOT / "jobs"), os.environ["PYTHONPATH"]])
    environment = os.environ | {"PYTHONPATH": path}
    command = [sys.executable, "-c", REFUSED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == (
        "error: The system refused at /proc/self/mem/x (Not a directory); see to that, and give "
        "the command again.\n"
    )
