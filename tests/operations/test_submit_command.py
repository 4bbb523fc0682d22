"""The command line of submit_job.py, with a job server in this process."""

import pytest
from job_servers import FakeServer

import submit_job


@pytest.fixture
def server(monkeypatch):
    server = FakeServer()
    monkeypatch.setattr(submit_job, "connect", lambda address: server)
    return server


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["submit_job.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        submit_job.main()
    return ended.value.code


def ending(server, *outcomes):
    """Each job that is submitted ends with the next outcome, as (status, exit code, type)."""
    left = list(outcomes)

    def follow(_, job, output):
        status, code, kind = left.pop(0)
        server.end(job.id, status, code, error_type=kind)
        return submit_job.find_job(server, job.id)

    return follow


KILLED = ("FAILED", -9, "JOB_ENTRYPOINT_COMMAND_ERROR")
LOST = ("FAILED", None, "JOB_SUPERVISOR_ACTOR_DIED")
REFUSED = ("FAILED", 2, "JOB_ENTRYPOINT_COMMAND_ERROR")
DONE = ("SUCCEEDED", 0, None)


@pytest.mark.parametrize(
    ("outcomes", "retries", "code", "attempts"),
    [
        ([DONE], 0, 0, 1),
        ([REFUSED], 3, 2, 1),
        ([KILLED], 0, 137, 1),
        ([KILLED, LOST, DONE], 3, 0, 3),
        ([KILLED, REFUSED], 3, 2, 2),
        ([LOST, LOST], 1, 1, 2),
        ([("STOPPED", None, None)], 3, 130, 1),
    ],
)
def test_only_what_was_killed_is_tried_again(
    server, monkeypatch, capsys, outcomes, retries, code, attempts
):
    monkeypatch.setattr(submit_job, "follow", ending(server, *outcomes))
    command = ("--name", "x", f"--retries={retries}", "pretrain_model", "--config", "/r.yaml")
    assert run(monkeypatch, *command) == code
    assert list(server.jobs) == [f"x-{n}" for n in range(1, attempts + 1)]
    assert capsys.readouterr().err.count("starting the next attempt") == attempts - 1


def test_a_live_name_is_followed_and_told_of_if_it_does_something_else(server, monkeypatch, capsys):
    monkeypatch.setattr(submit_job, "follow", ending(server, DONE))
    assert run(monkeypatch, "--name", "x", "--detach", "export_model", "a", "b") == 0
    assert run(monkeypatch, "--name", "x", "--detach", "export_model", "a", "b") == 0
    assert "does something else" not in capsys.readouterr().err
    assert run(monkeypatch, "--name", "x", "export_model", "a", "c") == 0
    told = capsys.readouterr().err
    assert "x-1 is running already; following it" in told
    assert "it does something else (export_model a b)" in told
    assert list(server.jobs) == ["x-1"]


def test_options_of_the_job_are_the_jobs(server, monkeypatch):
    run(monkeypatch, "--detach", "--name", "x", "pretrain_model", "--name", "--address", "y")
    assert server.jobs["x-1"].entrypoint.endswith("jobs/pretrain_model.py --name --address y")


def test_list_status_and_logs(server, monkeypatch, capsys):
    server.put("x-1", "FAILED", driver_exit_code=2, end_time=62_000, metadata={"command": "a b"})
    server.put("y-1", "RUNNING")
    server.get_job_logs = lambda job_id: f"of {job_id}\n"
    assert run(monkeypatch, "list", "--address", "http://h:1") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["x-1", "FAILED"], ["y-1", "RUNNING"]]
    assert run(monkeypatch, "status", "x") == 2
    assert "x-1: FAILED, exit code 2" in capsys.readouterr().out
    assert run(monkeypatch, "status", "y-1") == 0
    assert run(monkeypatch, "logs", "x") == 0
    assert capsys.readouterr().out.endswith("of x-1\n")


def test_stop_waits_for_the_end_and_refuses_what_has_ended(server, monkeypatch, capsys):
    server.put("x-1", "RUNNING")
    assert run(monkeypatch, "stop", "x") == 0
    assert server.stopped == ["x-1"]
    assert "x-1 was stopped." in capsys.readouterr().err
    with pytest.raises(submit_job.ConfigError, match="x-1 cannot be stopped: it is stopped"):
        run(monkeypatch, "stop", "x")
