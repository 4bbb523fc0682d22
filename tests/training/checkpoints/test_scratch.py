"""The scratch that the processes of one node share."""

import subprocess
import sys

SLOWLY = """
import sys, time
from pathlib import Path
from raptide.training.checkpoints.scratch import made_once

def make(folder):
    with open(sys.argv[1], "a") as file:
        file.write("made\\n")
    time.sleep(1)
    folder.mkdir()
    (folder / "state").write_text("whole")

folder = made_once("a-run", "universal", "step-4", make)
print(folder, (folder / "state").read_text())
"""


def test_what_all_processes_of_a_node_need_is_made_by_one(tmp_path):
    """As a checkpoint's conversion to another number of workers is."""
    command = [sys.executable, "-c", SLOWLY, str(tmp_path / "log")]
    environment = {"TMPDIR": str(tmp_path)}
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(3)
    ]
    told = {process.communicate(timeout=60)[0] for process in started}
    assert [process.returncode for process in started] == [0, 0, 0]
    (line,) = told
    assert line.endswith(" whole\n")
    assert (tmp_path / "log").read_text() == "made\n"
