"""A script inside this process: the same code in a fraction of the time that its imports take."""

import contextlib
import io
import runpy
import subprocess
import sys
from unittest import mock

from conftest import ROOT


def job_in_process(name, *arguments, cwd):
    """What `subprocess.run` of `python jobs/NAME ARGUMENTS` would return.

    A job that needs Ray gets the session's; its test asks for the fixture `cluster`.
    """
    return script_in_process(ROOT / "jobs" / name, *arguments, cwd=cwd)


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
