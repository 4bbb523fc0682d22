"""A job is followed to its end, whatever becomes of the line."""

import asyncio
import io

import aiohttp
import draws
import pytest
from job_servers import FakeServer

import submit_job
from raptide.errors import ClusterError
from raptide.operations.following import JobOutput, follow
from raptide.operations.submission import find_job

LOG = "".join(f"line {n}\n" for n in range(40))


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def server():
    server = FakeServer()
    server.put("x-1", "RUNNING")
    return server


def followed(server, output=None, **settings):
    """What was printed, and the job at its end."""
    out, err = io.StringIO(), io.StringIO()

    async def no_time(_):
        await asyncio.sleep(0)

    job = follow(
        server,
        find_job(server, "x"),
        output or JobOutput(out, err),
        sleep=no_time,
        look_every_s=0.05,
        **settings,
    )
    return out.getvalue(), err.getvalue(), job


def ends(server, status="SUCCEEDED", code=0, **fields):
    return lambda: server.end("x-1", status, code, **fields)


def test_a_log_is_shown_whole_and_the_status_ends_it(server):
    server.tails = [[LOG[:50], LOG[50:], ends(server, "FAILED", 2)]]
    out, err, job = followed(server)
    assert (out, err) == (LOG, "")
    assert (job.status, job.code) == ("FAILED", 2)


def test_a_line_that_breaks_anywhere_is_taken_up_without_a_gap_or_a_repeat(server):
    cuts = sorted(int(cut) for cut in draws.generator().integers(0, len(LOG), 4))
    errors = (
        RuntimeError("WebSocket connection closed unexpectedly with close code 1006"),
        aiohttp.ServerDisconnectedError(),
        ConnectionResetError("reset"),
        aiohttp.ClientConnectionError("refused"),
    )
    server.tails = [
        *([LOG[:cut], error] for cut, error in zip(cuts, errors, strict=True)),
        [LOG[: cuts[-1]], LOG[cuts[-1] :], ends(server)],
    ]
    out, err, job = followed(server)
    assert out == LOG
    assert job.code == 0
    assert err.count("does not answer") == err.count("answers again: x-1 is running") == 4


def test_a_head_that_is_gone_for_a_while_is_waited_for(server):
    gone = [ConnectionError("refused")] * 5
    server.tails = [[LOG[:10], ConnectionError("reset")], [LOG, ends(server)]]
    job = find_job(server, "x")
    server.failures = [None, *gone]
    out, err = io.StringIO(), io.StringIO()
    pauses = []

    async def no_time(seconds):
        pauses.append(seconds)

    ended = follow(server, job, JobOutput(out, err), sleep=no_time, look_every_s=0.05)
    assert (ended.code, out.getvalue()) == (0, LOG)
    assert err.getvalue().count("does not answer") == 1, "it is said once"
    assert pauses[:5] == sorted(pauses[:5]), "ever more seldom"
    assert pauses[4] > pauses[0]


def test_the_status_ends_it_where_the_log_is_silent_for_ever(server, monkeypatch):
    monkeypatch.setattr("raptide.operations.following.LAST_LINES_S", 0.1)

    async def silent(_):
        yield "begun\n"
        server.end("x-1", "FAILED", -9)
        await asyncio.sleep(3600)

    server.tail_job_logs = silent
    out, _, job = followed(server)
    assert (out, job.code, job.lost) == ("begun\n", 137, True)


def test_a_head_that_forgot_the_job_is_told_from_one_that_is_still_waking_up(server):
    job = find_job(server, "x")
    there = server.jobs.pop("x-1")
    with pytest.raises(ClusterError, match=r"no job x-1 any more.*starts the next attempt"):
        follow(server, job, JobOutput(io.StringIO(), io.StringIO()), sleep=lambda _: _done())
    looks = []

    def wake_up(_):
        looks.append(1)
        if len(looks) == 2:
            server.jobs["x-1"] = there
            server.end("x-1", "SUCCEEDED", 0)
        return _done()

    output = JobOutput(io.StringIO(), io.StringIO())
    assert follow(server, job, output, sleep=wake_up).code == 0


async def _done():
    return None


def test_what_the_job_said_goes_where_the_job_would_have_said_it():
    out, err = io.StringIO(), io.StringIO()
    output = JobOutput(out, err)
    output.feed("2026-11-29 19:00:00,000\tINFO job_manager.py:550 -- Runtime env is setting up.\n")
    output.feed("Running entrypoint for job x-1: python\n  training on 2: step 3/9, loss 2.1\nRo")
    output.feed("om\nWarning: slow\nerror: --config x is missing.\nno newline")
    output.close()
    assert out.getvalue() == "Room\nno newline\n"
    assert err.getvalue() == (
        "  training on 2: step 3/9, loss 2.1\nWarning: slow\nerror: --config x is missing.\n"
    )


def test_on_a_terminal_the_progress_line_is_one_line():
    err = Terminal()
    output = JobOutput(io.StringIO(), err)
    output.feed("".join(f"  training on 2: step {n}/9, loss 2.1\n" for n in (1, 2, 3)))
    output.feed("Warning: slow\n")
    assert err.getvalue().count("\n") == 2
    assert err.getvalue().count("\r\x1b[K  training") == 3
    assert err.getvalue().endswith("step 3/9, loss 2.1\nWarning: slow\n")


class Interrupted:
    """Ctrl-C at the first following, the job's end at the next."""

    def __init__(self, server, *rest):
        self.calls = 0
        self.server = server

    def __call__(self, server, job, output):
        self.calls += 1
        if self.calls == 1:
            raise KeyboardInterrupt
        return find_job(self.server, "x")


@pytest.mark.parametrize(
    ("choice", "stopped", "calls"), [("detach", [], 1), ("stop", ["x-1"], 2), ("follow", [], 2)]
)
def test_ctrl_c_detaches_stops_or_goes_on(server, monkeypatch, capsys, choice, stopped, calls):
    interrupted = Interrupted(server)
    monkeypatch.setattr(submit_job, "follow", interrupted)
    ended = submit_job.watch(server, find_job(server, "x"), JobOutput(), ask=lambda job: choice)
    assert (server.stopped, interrupted.calls) == (stopped, calls)
    assert (ended is None) == (choice == "detach")
    told = capsys.readouterr().err
    assert ("x-1 goes on" in told) == (choice == "detach")
    assert ("Stopping x-1" in told) == (choice == "stop")


def test_without_a_terminal_ctrl_c_leaves_the_job_alone_and_says_so(server, monkeypatch, capsys):
    monkeypatch.setattr(submit_job, "follow", Interrupted(server))
    monkeypatch.setattr("sys.stdin", io.StringIO("s\n"))
    assert submit_job.watch(server, find_job(server, "x"), JobOutput()) is None
    assert server.stopped == []
    assert "`stop x` ends it" in capsys.readouterr().err


@pytest.mark.parametrize(("typed", "choice"), [("d", "detach"), ("Stop", "stop"), ("", "follow")])
def test_what_is_answered(server, monkeypatch, typed, choice):
    terminal = Terminal(f"{typed}\n")
    monkeypatch.setattr("sys.stdin", terminal)
    assert submit_job._ask(find_job(server, "x")) == choice
