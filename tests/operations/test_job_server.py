"""Jobs on Ray's own job server, with token: those that err, die, are stopped, and lose their line.

They are of a checkout that holds nothing but a script that needs no import, so each takes seconds.
"""

import io
import os
import signal
import threading
import time

import pytest
from cut_lines import Line
from raylets import Raylets

import submit_job
from raptide.operations import submission

NAP = """
import os, pathlib, signal, sys, time

def saved(number, frame):
    time.sleep(5)  # longer than Ray waits by itself
    pathlib.Path(words[0]).write_text("saved")
    sys.exit(143)

if __name__ == "__main__":
    kind, *words = sys.argv[1:]
    if kind == "err":
        print("out", flush=True)
        print("error: --config x is missing; give another.", file=sys.stderr)
        sys.exit(2)
    if kind == "die":
        marker = pathlib.Path(words[0])
        if not marker.exists():
            marker.write_text("")
            os.kill(os.getpid(), signal.SIGKILL)
    if kind == "stop":
        signal.signal(signal.SIGTERM, saved)
        print("ready", flush=True)
        time.sleep(300)
    if kind == "count":
        for n in range(int(words[0])):
            print(f"line {n}", flush=True)
            pathlib.Path(words[1]).touch()
            time.sleep(0.05)
    if kind == "wait":
        while not pathlib.Path(words[0]).exists():
            time.sleep(0.1)
    print(os.environ["RAPTIDE_CODE_VERSION"].split("+")[0], os.getcwd())
"""


@pytest.fixture(scope="module")
def cluster():
    with Raylets(2) as cluster:
        yield cluster


def with_headers(monkeypatch, headers):
    """What RAY_AUTH_MODE=token does, which Ray reads before it is imported."""
    before = submission.JobSubmissionClient.__init__
    monkeypatch.setattr(
        submission.JobServer,
        "__init__",
        lambda self, address: before(self, address, headers=headers),
    )


@pytest.fixture
def run(cluster, tmp_path_factory, monkeypatch):
    """Runs submit_job.py in this process; returns its exit code."""
    checkout = tmp_path_factory.getbasetemp() / "checkout"
    for folder in ("jobs", "platform/raptide"):
        (checkout / folder).mkdir(parents=True, exist_ok=True)
    (checkout / "jobs/nap.py").write_text(NAP)
    (checkout / "secret.fasta").write_text(">a\nMK\n")
    monkeypatch.setattr(submit_job, "CHECKOUT", checkout)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with_headers(monkeypatch, cluster.headers)

    def submit(*arguments, address=cluster.url):
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", address)
        monkeypatch.setattr("sys.argv", ["submit_job.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            submit_job.main()
        return ended.value.code

    return submit


def test_a_jobs_mistake_arrives_as_its_own_sentence_and_exit_code(run, capsys):
    assert run("--name", "err", "nap", "err") == 2
    told = capsys.readouterr()
    assert told.out == "out\n"
    assert told.err == "Submitted err-1.\nerror: --config x is missing; give another.\n"
    assert run("status", "err") == 2
    assert run("--name", "err", "nap", "wait", "/dev/null") == 0
    told = capsys.readouterr()
    assert "Submitted err-2." in told.err, "a name that has ended starts its next attempt"
    assert "working_dir_files" in told.out


@pytest.mark.thorough
def test_many_submits_of_one_name_are_one_job(run, cluster, tmp_path, capsys):
    gate, codes = tmp_path / "gate", []
    address = submit_job.connect(cluster.url)
    shipment = submit_job.pack(
        submit_job.CHECKOUT, "nap", ["wait", str(gate)], code_version="1", python="python"
    )

    def race():
        job, ours = submit_job.submit(address, "race", shipment)
        codes.append((job.id, ours))

    threads = [threading.Thread(target=race) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(codes) == [("race-1", False)] * 3 + [("race-1", True)]
    threading.Timer(5, gate.write_text, ("",)).start()
    assert run("--name", "race", "nap", "wait", gate) == 0
    assert "race-1 is " in capsys.readouterr().err


@pytest.mark.thorough
def test_a_job_that_was_killed_is_tried_again(run, tmp_path, capsys):
    assert run("--name", "die", "--retries", "2", "nap", "die", tmp_path / "once") == 0
    told = capsys.readouterr().err
    assert "die-1 was killed (exit code -9)" in told
    assert "Submitted die-2." in told


def test_a_job_that_is_stopped_has_time_to_save(run, tmp_path, capsys):
    file = tmp_path / "saved"
    assert run("--detach", "--name", "stop", "nap", "stop", file) == 0
    until = time.monotonic() + 60
    ready = False
    while not ready:
        assert time.monotonic() < until
        assert run("logs", "stop") == 0
        ready = "ready" in capsys.readouterr().out
    assert run("stop", "stop") == 0
    assert file.read_text() == "saved"
    assert "stop-1 was stopped." in capsys.readouterr().err
    assert run("status", "stop") == 130


def test_a_line_that_is_cut_twice_loses_and_repeats_nothing(run, cluster, tmp_path, capsys):
    """The job counts for ten seconds at least; a submission that is cut: test_submission.py."""
    line, begun = Line(int(cluster.url.rpartition(":")[2])), tmp_path / "begun"

    def cut():
        until = time.monotonic() + 120
        while not begun.exists() and time.monotonic() < until:
            time.sleep(0.1)
        for _ in range(2):
            time.sleep(1.5)
            line.cut()
            time.sleep(1.0)
            line.mend()

    cutter = threading.Thread(target=cut)
    cutter.start()
    assert run("--name", "count", "nap", "count", "200", begun, address=line.url) == 0
    cutter.join()
    line.close()
    told = capsys.readouterr()
    assert told.out.splitlines()[:-1] == [f"line {n}" for n in range(200)]
    assert "The cluster does not answer" in told.err
    assert "count-1 is running" in told.err


@pytest.mark.thorough
def test_ctrl_c_without_a_terminal_leaves_the_job_alone(run, tmp_path, monkeypatch, capsys):
    gate = tmp_path / "gate"
    monkeypatch.setattr("sys.stdin", io.StringIO())
    command = ("--name", "left", "nap", "wait", gate)
    timer = threading.Timer(5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    assert run(*command) == 130
    assert "left-1 goes on; submitting it again follows it" in capsys.readouterr().err
    opener = threading.Timer(5, gate.write_text, ("",))
    opener.start()
    assert run(*command) == 0
    assert "left-1 is running already; following it." in capsys.readouterr().err


# Empty, not left out: a process whose Ray has a token would send that one.
@pytest.mark.parametrize("header", ["", f"Bearer {'0' * 64}"])
def test_without_the_token_it_is_refused_in_one_sentence(cluster, monkeypatch, header):
    with_headers(monkeypatch, {"Authorization": header})
    with pytest.raises(submit_job.ConfigError, match=r"wants a token .*RAY_AUTH_TOKEN_PATH"):
        submit_job.connect(cluster.url)
