"""A job server in this process, as Ray's client shows it, with whatever may befall it."""

import threading
import time
from types import SimpleNamespace


class FakeServer:
    """Keeps jobs; each gets the next of `logs`, a list of what its log tails give in turn."""

    def __init__(self, *logs):
        self.jobs = {}
        self.logs = list(logs)
        self.tails = []
        """What connections to a log give: lists of text, and of errors to be raised."""
        self.stopped = []
        self.failures = []
        """Errors that the next questions raise, first one first; None answers."""
        self._lock = threading.Lock()
        self.at_submit = None
        """Called before a submission is taken."""

    def list_jobs(self):
        self._fail()
        return list(self.jobs.values())

    def get_job_info(self, job_id):
        self._fail()
        if job_id not in self.jobs:
            raise RuntimeError(f"Request failed with status code 404: Job {job_id} does not exist.")
        return self.jobs[job_id]

    def submit_job(self, *, entrypoint, submission_id, runtime_env, metadata):
        if self.at_submit is not None:
            self.at_submit()
        with self._lock:
            if submission_id in self.jobs:
                raise RuntimeError(
                    "Request failed with status code 500: ValueError: Job with submission_id "
                    f"{submission_id} already exists. Please use a different submission_id."
                )
            self.put(submission_id, "RUNNING", entrypoint=entrypoint, metadata=metadata)

    def stop_job(self, job_id):
        self.stopped.append(job_id)
        self.end(job_id, "STOPPED")
        return True

    def put(self, job_id, status, **fields):
        fields = {
            "entrypoint": "sleep 1",
            "metadata": {},
            "driver_exit_code": None,
            "message": "",
            "error_type": None,
            "start_time": 1000 * (1 + len(self.jobs)),
            "end_time": None,
        } | fields
        self.jobs[job_id] = SimpleNamespace(submission_id=job_id, status=status, **fields)

    def end(self, job_id, status, code=None, **fields):
        self.jobs[job_id].__dict__.update(
            status=status, driver_exit_code=code, end_time=1000 * time.time(), **fields
        )

    async def tail_job_logs(self, job_id):
        for each in self.tails.pop(0) if self.tails else []:
            if isinstance(each, BaseException):
                raise each
            if callable(each):
                each()
            else:
                yield each

    def _fail(self):
        if self.failures and (error := self.failures.pop(0)) is not None:
            raise error
