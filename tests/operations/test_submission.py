"""Names, attempts and what came of them, with a job server in this process."""

import threading

import draws
import pytest
from job_servers import FakeServer

from raptide.errors import ClusterError, ConfigError
from raptide.operations import submission
from raptide.operations.shipping import Shipment
from raptide.operations.submission import Job, attempts, connect, find_job, submit

SHIPMENT = Shipment("pretrain_model --config x.yaml", "exec python jobs/pretrain_model.py", {})


def test_attempts_of_a_name_count_up_and_one_is_live_at_most():
    server = FakeServer()
    for attempt in (1, 2, 3):
        job, ours = submit(server, "nightly", SHIPMENT)
        assert (job.id, ours) == (f"nightly-{attempt}", True)
        again, ours = submit(server, "nightly", SHIPMENT)
        assert (again.id, ours) == (job.id, False)
        assert again.command == SHIPMENT.command
        server.end(job.id, "FAILED", -9)
    other, ours = submit(server, "nightly-2", SHIPMENT)
    assert (other.id, ours) == ("nightly-2-1", True), "a name may look like an attempt"


def test_of_many_that_submit_at_once_one_starts_and_all_have_its_job():
    server, found = FakeServer(), []
    number = int(draws.generator().integers(3, 9))
    gate = threading.Barrier(number)
    server.at_submit = gate.wait  # all have looked before the first is taken

    def run():
        found.append(submit(server, "race", SHIPMENT))

    threads = [threading.Thread(target=run) for _ in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert [job.id for job, _ in found] == ["race-1"] * number
    assert [ours for _, ours in found].count(True) == 1
    assert list(server.jobs) == ["race-1"]


def test_two_that_followed_a_job_that_died_start_one_attempt_however_short_it_is():
    server = FakeServer()
    first, _ = submit(server, "x", SHIPMENT)
    server.end(first.id, "FAILED", -9)
    second, ours = submit(server, "x", SHIPMENT, after=first.attempt)
    assert ours
    server.end(second.id, "SUCCEEDED", 0)
    late, ours = submit(server, "x", SHIPMENT, after=first.attempt)
    assert (late.id, late.status, ours) == ("x-2", "SUCCEEDED", False)
    anew, ours = submit(server, "x", SHIPMENT)
    assert (anew.id, ours) == ("x-3", True)


def test_a_submission_whose_answer_was_lost_is_found_and_not_repeated():
    server = FakeServer()
    take = server.submit_job

    def lose_the_answer(**given):
        take(**given)
        raise ConnectionError("reset by peer")

    server.submit_job = lose_the_answer
    job, ours = submit(server, "x", SHIPMENT)
    assert (job.id, job.status, ours) == ("x-1", "RUNNING", True)


@pytest.mark.parametrize("name", ["", "-x", "a b", "a/b", "ä"])
def test_what_is_no_name_is_refused(name):
    with pytest.raises(ConfigError, match="--name must be letters"):
        submit(FakeServer(), name, SHIPMENT)


def test_a_server_that_refuses_is_one_sentence():
    server = FakeServer()
    server.failures = [RuntimeError("Request failed with status code 500:\nTraceback …")]
    with pytest.raises(ClusterError, match=r"status code 500: Traceback") as refused:
        submit(server, "x", SHIPMENT)
    assert "\n" not in str(refused.value)


def test_jobs_are_found_by_name_and_by_id_and_others_are_left_alone():
    server = FakeServer()
    server.put("a-1", "FAILED")
    server.put("a-2", "RUNNING")
    server.put("raysubmit_x7", "RUNNING")
    server.put("b-10", "SUCCEEDED")
    assert [job.id for job in attempts(server)] == ["a-1", "a-2", "b-10"]
    assert find_job(server, "a").id == "a-2"
    assert find_job(server, "a-1").status == "FAILED"
    assert find_job(server, "b").attempt == 10
    with pytest.raises(ConfigError, match="no job 'c'; it knows a, b"):
        find_job(server, "c")


@pytest.mark.parametrize(
    ("status", "exit_code", "error_type", "code", "lost"),
    [
        ("SUCCEEDED", 0, "", 0, False),
        ("STOPPED", None, "", 130, False),
        ("FAILED", 2, "JOB_ENTRYPOINT_COMMAND_ERROR", 2, False),
        ("FAILED", 1, "JOB_ENTRYPOINT_COMMAND_ERROR", 1, False),
        ("FAILED", -9, "JOB_ENTRYPOINT_COMMAND_ERROR", 137, True),
        ("FAILED", 137, "JOB_ENTRYPOINT_COMMAND_ERROR", 137, True),
        ("FAILED", None, "JOB_SUPERVISOR_ACTOR_DIED", 1, True),
        ("FAILED", None, "RUNTIME_ENV_SETUP_FAILURE", 1, False),
    ],
)
def test_only_what_was_killed_is_lost_and_exit_codes_are_the_jobs(
    status, exit_code, error_type, code, lost
):
    job = Job("x", 1, status, "…", exit_code, error_type=error_type)
    assert (job.code, job.lost) == (code, lost)


def test_an_address_where_nothing_answers_is_refused_with_the_remedy(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:2")
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match=r"http://127\.0\.0\.1:1 does not answer.*HEAD:8265"):
        connect("http://127.0.0.1:1")  # and not where the variable points
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)


def test_another_ray_is_refused(monkeypatch):
    class OtherRay:
        _server_ray_version = "2.59.1"

        def __init__(self, address):
            pass

    monkeypatch.setattr(submission, "JobServer", OtherRay)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://head:8265")
    with pytest.raises(ConfigError, match=r"http://head:8265 runs 2\.59\.1"):
        connect(None)
