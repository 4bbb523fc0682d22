"""Two builds of one corpus at the same time: the later one goes on, the other one ends."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest

from raptide.data.building.build import BuildSettings, build_corpus
from raptide.data.building.partial import PartialFolder
from raptide.errors import Superseded

SETTINGS = BuildSettings(block_residues=4096, holdout_fraction=0.2)

SCRIPT = """
import sys
from raptide.cluster import ray_session
from raptide.data.building.build import BuildSettings, build_corpus
with ray_session(num_cpus=1):
    settings = BuildSettings.model_validate_json(sys.argv[3])
    build_corpus([sys.argv[1]], sys.argv[2], settings, say=lambda line: print(line, flush=True))
"""


@pytest.fixture
def fasta(proteome, tmp_path):
    file = tmp_path / "a.fasta"
    file.write_bytes(proteome.read_bytes()[:100_000].rpartition(b">")[0])
    return file


def build_and_be_interrupted(fasta, at, interrupt):
    """Build a corpus, and do something else when it says what it is at."""
    return build_corpus(
        [fasta],
        fasta.with_name("corpus"),
        SETTINGS,
        say=lambda line: interrupt() if line.startswith(at) else None,
    )


@pytest.mark.parametrize("fraction", [SETTINGS.holdout_fraction, 0.5])
def test_a_build_that_another_has_overtaken_ends_and_harms_nothing(cluster, fasta, fraction):
    """One of the same settings finds the survey there, one of others begins anew."""
    made = []
    settings = SETTINGS.model_copy(update={"holdout_fraction": fraction})

    def overtake():
        made.append(build_corpus([fasta], fasta.with_name("corpus"), settings))

    with pytest.raises(Superseded, match=r"corpus\.partial \(finished or begun anew since\)"):
        build_and_be_interrupted(fasta, "Pass 2", overtake)
    made[0].verify()
    assert sorted(path.name for path in fasta.parent.iterdir()) == ["a.fasta", "corpus"]


@pytest.mark.parametrize("at", ["Pass 1", "Pass 2"])
def test_a_build_ends_once_another_has_begun_and_names_it(cluster, fasta, at):
    others = []

    def begin():
        plan = (fasta.with_name("corpus.partial") / "plan.json").read_text()
        folder = fasta.with_name("corpus.partial")
        others.append(PartialFolder.open(folder, json.loads(plan), id))

    with pytest.raises(Superseded) as caught:
        build_and_be_interrupted(fasta, at, begin)
    host = re.escape(socket.gethostname())
    assert re.search(rf"\({others[0].attempt}, process \d+ on {host}, since 20", str(caught.value))
    others[0].refuse_others()
    assert not list(others[0].path.glob("bucket-*.json")), "the loser has written a bucket"
    again = build_corpus([fasta], fasta.with_name("corpus"), SETTINGS)
    again.verify()


@pytest.mark.thorough
def test_a_build_that_wakes_after_another_has_finished_ends(cluster, fasta):
    """Two processes; the first one stands still for a while, as where it is out of reach."""
    output = fasta.with_name("corpus")
    command = [sys.executable, "-c", SCRIPT, fasta, output, SETTINGS.model_dump_json()]
    first = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while "Pass 2" not in (line := first.stdout.readline()):
        assert line, first.stderr.read()
    family = [first, *psutil.Process(first.pid).children(recursive=True)]
    for process in family:
        os.kill(process.pid, signal.SIGSTOP)
    try:
        corpus = build_corpus([fasta], output, SETTINGS)
    finally:
        for process in family:
            os.kill(process.pid, signal.SIGCONT)
    _, told = first.communicate(timeout=120)
    assert first.returncode != 0
    assert "raptide.errors.Superseded: Another attempt has taken over" in told
    corpus.verify()
    until = time.monotonic() + 30
    while len(list(fasta.parent.iterdir())) > 2 and time.monotonic() < until:
        time.sleep(0.1)
    assert sorted(path.name for path in fasta.parent.iterdir()) == ["a.fasta", "corpus"]
