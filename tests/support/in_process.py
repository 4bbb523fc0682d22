"""A script inside this process: the same code in a fraction of the time that its imports take."""

import contextlib
import io
import os
import runpy
import subprocess
import sys
from unittest import mock

from conftest import ROOT


def job_in_process(name, *arguments, cwd, stdin=None, env=None):
    """What `subprocess.run` of `python jobs/NAME ARGUMENTS` would return.

    A job that needs Ray gets the session's; its test asks for the fixture `cluster`.

    Args:
        stdin: a file to read standard input from.
        env: joins the environment.
    """
    with standard_input(stdin), mock.patch.dict(os.environ, env or {}):
        return script_in_process(ROOT / "jobs" / name, *arguments, cwd=cwd)


@contextlib.contextmanager
def standard_input(file):
    """Within the block, descriptor 0 reads from a file, if there is one."""
    if file is None:
        yield
        return
    before = os.dup(0)
    os.dup2(file.fileno(), 0)
    try:
        yield
    finally:
        os.dup2(before, 0)
        os.close(before)


def script_in_process(path, *arguments, cwd):
    """The same for any script."""
    command = [str(path), *map(str, arguments)]
    code, out, err = 0, io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "argv", command),
        mock.patch.object(sys, "path", [str(path.parent), *sys.path]),
    ):
        try:
            runpy.run_path(command[0], run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
    return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())
