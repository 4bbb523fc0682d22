"""deploy/slurm.sh, with programs of our own in the place of Slurm's and Ray's."""

import os
import signal
import subprocess
import time

import pytest
from conftest import ROOT

PROGRAMS = {
    # Runs the command where it stands, and notes the node it was meant for.
    "bin/srun": r"""
        while [[ "$1" == --* ]]; do
            [[ "$1" == --nodelist=* ]] && node="${1#--nodelist=}"
            shift
        done
        echo "$node: $*" >> "$NOTES"
        exec "$@"
    """,
    "bin/scontrol": r"""
        if [[ "$1" == show ]]; then printf '%s\n' node-1 node-2 node-3; exit; fi
        echo "scontrol $*" >> "$NOTES"
    """,
    "bin/hostname": "echo 10.0.0.1 fd00::1",
    ".venv/bin/ray": r"""
        [[ "$1" == health-check ]] && exit 0
        trap 'echo "ended: ray" >> "$NOTES"; exit' TERM
        echo "up: ray" >> "$NOTES"
        sleep 60 & wait
    """,
    ".venv/bin/python": r"""
        echo "joins $RAY_ADDRESS with $RAY_AUTH_MODE of ${#RAY_AUTH_TOKEN}" >> "$NOTES"
        trap 'echo "ended: job" >> "$NOTES"; exit 130' TERM
        until [[ "$(grep --count "up: ray" "$NOTES")" == 3 ]]; do sleep 0.05; done
        echo "trains" >> "$NOTES"
        [[ -n "${JOB_STATUS:-}" ]] && exit "$JOB_STATUS"
        sleep 60 & wait
    """,
}


@pytest.fixture
def start(tmp_path):
    """Starts the script in a checkout of stand-ins; with `notes`, what these have noted."""
    for name, body in PROGRAMS.items():
        program = tmp_path / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(f"#!/bin/bash\n{body}")
        program.chmod(0o755)
    started = []

    def run(**variables):
        environment = {
            "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
            "NOTES": str(tmp_path / "notes"),
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NODELIST": "node-[1-3]",
            "SLURM_SUBMIT_DIR": str(tmp_path),
            "SLURM_CPUS_PER_TASK": "96",
            **variables,
        }
        command = [str(ROOT / "deploy/slurm.sh"), "--config", "a.yaml", "corpus=/with a space"]
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        started.append(process)
        return process

    (tmp_path / "notes").touch()
    run.notes = (tmp_path / "notes").read_text
    yield run
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def test_ray_starts_on_every_node_and_the_job_on_the_head(start):
    assert start(JOB_STATUS="3").wait(timeout=60) == 3
    notes = start.notes().splitlines()
    job = [note for note in notes if "pretrain_model.py" in note]
    assert len(job) == 1
    assert job[0].startswith("node-1: ")
    assert job[0].endswith(
        "jobs/pretrain_model.py --start-or-resume --config a.yaml corpus=/with a space"
    )
    starts = [note for note in notes if "ray start" in note]
    heads = [note for note in starts if "--head" in note]
    workers = [note for note in starts if "--address=" in note]
    assert [note.split(":")[0] for note in heads] == ["node-1"]
    assert sorted(note.split(":")[0] for note in workers) == ["node-2", "node-3"]
    assert all("--address=10.0.0.1:24711" in note for note in workers)
    assert "joins 10.0.0.1:24711 with token of 64" in notes
    assert sum(note == "ended: ray" for note in notes) == 3


def test_a_notice_ends_everything_and_queues_the_job_again(start):
    process = start()
    until = time.monotonic() + 60
    while "trains" not in start.notes():
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    notes = start.notes().splitlines()
    assert notes[-5:] == ["ended: job", *3 * ["ended: ray"], "scontrol requeue 4711"]
