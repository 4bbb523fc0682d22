"""The command `raptide` over the same jobs."""

import contextlib
import importlib
import io
import subprocess
import sys
from unittest import mock

import pytest
from conftest import ROOT

from raptide.__main__ import MODULES, jobs, main, short_name


@contextlib.contextmanager
def unimported(*modules):
    """Modules that are to be run are not imported, as in a process that a command has to itself."""
    imported = {name: sys.modules.pop(name) for name in modules if name in sys.modules}
    try:
        yield
    finally:
        sys.modules.update(imported)


def raptide(*arguments, cwd):
    """What the command does, in this process, in which its imports are paid already."""
    code, out, err = 0, io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "argv", ["raptide", *map(str, arguments)]),
        mock.patch.object(sys, "path", [*sys.path]),
        unimported("serve.__main__", "serve.keys"),
    ):
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def test_what_other_tests_import_may_still_be_run(tmp_path):
    importlib.import_module("serve.__main__")
    importlib.import_module("serve.keys")
    assert raptide("serve", "none.yaml", cwd=tmp_path).returncode == 2
    assert raptide("serve-keys", "--help", cwd=tmp_path).returncode == 0
    assert "serve.keys" in sys.modules


def test_every_job_has_a_short_name_of_its_own():
    scripts = [path for path in (ROOT / "jobs").glob("*.py") if "run_job(main)" in path.read_text()]
    names = jobs()
    assert len(names) == len(scripts)
    assert not names.keys() & MODULES.keys()
    expected = {
        "pretrain_model": "pretrain",
        "embed_proteins": "embed",
        "score_variants": "score-variants",
        "build_corpus": "build-corpus",
        "run_demo": "demo",
    }
    assert {job: short_name(job) for job in expected} == expected


def test_help_is_the_jobs_with_commands_as_they_were_called(tmp_path):
    done = raptide("fetch-corpus", "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "\n    raptide fetch-corpus uniref100 --output" in done.stdout
    assert "usage: raptide fetch-corpus" in done.stdout
    assert "python jobs/" not in done.stdout


def test_errors_and_exit_codes_are_the_jobs(tmp_path):
    done = raptide("build-corpus", "--input", "none.fasta", "--output", "c", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert "none.fasta" in done.stderr
    assert raptide("build_corpus", cwd=tmp_path).returncode == 2


def test_recipes_that_come_along_are_called_by_name(tmp_path):
    done = raptide("pretrain", "--config", "demo", "--dry-run", "corpus=none", cwd=tmp_path)
    assert done.returncode == 2
    assert "none" in done.stderr
    assert "demo" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.yaml"], "none.yaml cannot be read"),
        (["model=none", "replicas"], "form name=value, but 'replicas'"),
    ],
)
def test_serve_takes_a_file_or_settings(tmp_path, arguments, message):
    done = raptide("serve", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr


def test_another_package_of_the_endpoints_name_is_told(tmp_path):
    (tmp_path / "serve.py").write_text("")
    done = raptide("serve", "model=none", cwd=tmp_path)
    assert done.returncode == 2
    assert "start in another folder" in done.stderr
    assert str(tmp_path / "serve.py") in done.stderr


def test_settings_deploy_what_serve_run_would():
    from serve.__main__ import of_settings

    (application,) = of_settings(["model=runs/demo", "replicas=2"]).applications
    assert application.import_path == "serve.app:build"
    assert application.args == {"model": "runs/demo", "replicas": "2"}


def test_the_version_names_the_commit_of_a_checkout():
    from raptide.version import code_version, commit

    head = ["git", "rev-parse", "--short=12", "HEAD"]
    known = subprocess.run(head, cwd=ROOT, capture_output=True, text=True)
    if known.returncode == 0:  # an unpacked archive has no history
        assert commit().removesuffix("-dirty") == known.stdout.strip()
        assert code_version() == f"0.1.0+{commit()}"


def test_an_environment_within_somebody_elses_checkout_names_no_commit(tmp_path, monkeypatch):
    from raptide import version

    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    monkeypatch.setattr(version, "HERE", tmp_path / "env/lib/raptide")
    version.commit.cache_clear()
    try:
        assert version.commit() == ""
    finally:
        version.commit.cache_clear()
