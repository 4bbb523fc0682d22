import json
import os
import resource

from raptide.training.watching.audit import AUDIT, audited_steps, read_audit


def write(run, rank, *lines):
    (run / AUDIT).mkdir(exist_ok=True)
    with (run / AUDIT / f"rank-{rank:05d}.jsonl").open("a") as file:
        for attempt, step in lines:
            rows = [[0, step, rank, f"hash-{attempt}"]]
            file.write(json.dumps({"step": step, "attempt": attempt, "rows": rows}) + "\n")


def test_a_step_counts_by_its_last_attempt_and_what_was_redone_is_told(tmp_path):
    """Two workers up to step 4, killed; three from step 3 on; one from step 4 on."""
    for rank in range(2):
        write(tmp_path, rank, (1, 1), (1, 2), (1, 3), (1, 4))
    with (tmp_path / AUDIT / "rank-00000.jsonl").open("a") as file:
        file.write('{"step": 5, "att\n')
    for rank in range(3):
        write(tmp_path, rank, (2, 3), (2, 4), (2, 5))
    write(tmp_path, 0, (3, 4), (3, 5), (3, 6))
    found = {
        step: [(rank, seen) for _, _, rank, seen in rows] for step, rows in audited_steps(tmp_path)
    }
    assert found == {
        **{step: [(0, "hash-1"), (1, "hash-1")] for step in (1, 2)},
        3: [(0, "hash-2"), (1, "hash-2"), (2, "hash-2")],
        **{step: [(0, "hash-3")] for step in (4, 5, 6)},
    }
    audit = read_audit(tmp_path)
    assert (audit.steps, audit.rows, audit.attempts) == (6, 10, 3)
    assert (audit.redone_steps, audit.longest_redone) == (4, 2)


def test_more_ranks_than_files_that_may_be_open(tmp_path):
    """A file a rank, 1,024 of them, where a process may open as many in all."""
    for rank in range(200):
        write(tmp_path, rank, (1, 1), (1, 2))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 50, hard))
    try:
        audit = read_audit(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (audit.steps, audit.rows) == (2, 400)
